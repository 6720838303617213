"""The graph of runs: who started from whose result. Laid out in columns by distance from the beginning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDE, _HIGH, _GAP_X, _GAP_Y = 150, 50, 56, 16
_BOW = 40  # how deep the control points of a bow lie; it reaches three quarters of that


@dataclass(frozen=True)
class Node:
    """A run in the graph, at a pixel (its upper left corner)."""

    name: str
    note: str
    x: float
    y: float
    wide: int = _WIDE
    high: int = _HIGH


@dataclass(frozen=True)
class Lineage:
    """Nodes and edges (SVG path data), with the size of the picture."""

    nodes: tuple[Node, ...]
    edges: tuple[str, ...]
    width: float
    height: float


def lay_out(names: Sequence[str], parents: Mapping[str, Sequence[str]], notes: Mapping[str, str]) -> Lineage:
    """`parents[name]`: those of `names` that it was made from. A run stands one column right of its last parent."""
    column = dict.fromkeys(names, 0)
    for _ in names:  # longest path: as many rounds as the graph could be long
        for name in names:
            column[name] = max([column[p] + 1 for p in parents.get(name, ())], default=0)
    columns = [[name for name in names if column[name] == c] for c in range(max(column.values(), default=-1) + 1)]
    tallest = max(map(len, columns), default=0)
    height = tallest * (_HIGH + _GAP_Y) - _GAP_Y
    nodes = {}
    for c, members in enumerate(columns):
        top = (height - (len(members) * (_HIGH + _GAP_Y) - _GAP_Y)) / 2
        for row, name in enumerate(members):
            nodes[name] = Node(name, notes.get(name, ""), c * (_WIDE + _GAP_X), top + row * (_HIGH + _GAP_Y))
    edges = [_edge(nodes[parent], nodes[name]) for name in names for parent in parents.get(name, ())]
    width = len(columns) * (_WIDE + _GAP_X) - _GAP_X
    return Lineage(tuple(nodes.values()), tuple(edges), width, height + (_BOW if len(columns) > 2 else 0))


def _edge(start: Node, end: Node) -> str:
    """To the next column straight; further ones by a bow underneath, so that no run is crossed."""
    if end.x - start.x > _WIDE + _GAP_X:
        x1, x2, low = start.x + 0.7 * start.wide, end.x + 0.3 * end.wide, max(start.y, end.y) + _HIGH
        return f"M{x1} {start.y + _HIGH} C{x1} {low + _BOW} {x2} {low + _BOW} {x2} {end.y + _HIGH + 5}"
    x1, y1, x2, y2 = start.x + start.wide, start.y + start.high / 2, end.x, end.y + end.high / 2
    bend = _GAP_X * 0.55
    return f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2 - 5} {y2}"
