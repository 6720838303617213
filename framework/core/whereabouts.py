"""Where the ranks of a run stand: each says it in words, and what all have said makes one sentence for a person.

Left out: how the words travel between ranks, and when the sentence is due (`deadline`).
"""

import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

_MOST = 6  # places that a sentence lists
_STILL_S = 1.0  # how long a rank has stood somewhere before that is worth a word
# Python files whose innermost frames mean that a rank waits for others: torch's collectives (FSDP's too) and ours.
_WAITING = ("/torch/distributed/", "/framework/parallel/collectives.py", "/framework/parallel/pipeline.py")
_FRAMES = 3


@dataclass(frozen=True)
class Post:
    """What a rank says of itself. Example: Post("step 3, micro-batch 1 of 4", line="layers.py:40 in forward")"""

    phase: str
    past: bool = False  # the phase is over, and the next has not begun
    line: str = ""  # of code that the main thread is in
    waits: bool = False  # for other ranks
    seconds: float = 0.0  # since it entered or left a phase
    beat: int = 0  # grows while the process lives


class Phases:
    """The phases that this process is in, one inside the other. `moved`: when it last entered or left one."""

    def __init__(self) -> None:
        self._open: list[_Phase] = []
        self._last: tuple[str, ...] = ()
        self._deepest = False
        self._frozen: Post | None = None
        self.moved = time.monotonic()

    def enter(self, name: str, patient: bool = False) -> "_Phase":
        """Returns what `leave` wants back. `patient`: the phase may last, as long as no other begins inside."""
        entry = _Phase(name, patient)
        self._open.append(entry)
        self._deepest, self.moved = True, time.monotonic()
        return entry

    def leave(self, entry: "_Phase") -> None:
        """Out of a phase; of those within one another the innermost is remembered."""
        if self._deepest:
            self._last, self._deepest = tuple(each.name for each in self._open), False
        self._open = [each for each in self._open if each is not entry]
        self.moved = time.monotonic()

    def late(self, seconds: float) -> bool:
        """Whether this process has been in one phase, with none entered or left inside, for longer than it may."""
        now = list(self._open)
        return bool(now) and not now[-1].patient and time.monotonic() - self.moved > seconds

    def freeze(self) -> None:
        """A collective has failed: whoever asks from now on hears where, not how far the cleaning up has come."""
        self._frozen = self._frozen or Post(self._words()[0], waits=True)

    def post(self, beat: int = 0) -> Post:
        """Where the process stands now; from any thread."""
        if self._frozen is not None:
            return replace(self._frozen, beat=beat)
        line, waits = _main_line()
        phase, past = self._words()
        return Post(phase, past, line, waits and not past, time.monotonic() - self.moved, beat)

    def _words(self) -> tuple[str, bool]:
        now = [each.name for each in list(self._open)]
        return ", ".join(now or self._last) or "the beginning", not now and bool(self._last)


@dataclass(frozen=True, eq=False)
class _Phase:
    name: str
    patient: bool


def sentence(posts: Mapping[int, Post | None], gone: Iterable[int] = ()) -> str:
    """Ranks at the same place in one clause; first those that are gone, then those at work, last those that wait.

    >>> sentence({0: Post("the sum of x", waits=True), 1: Post("step 3", line="a.py:7 in f", seconds=9.0)})
    'rank 1 is at step 3 (a.py:7 in f) for 9 s, slow or stuck; rank 0 waits at the sum of x'
    """
    lost, places = set(gone), dict[tuple[int, str], list[int]]()
    for rank, post in sorted(posts.items()):
        places.setdefault(_place(post, rank in lost), []).append(rank)
    order = sorted(places, key=lambda place: (place[0], len(places[place]), places[place][0]))
    clauses = [_clause(*place, places[place], posts) for place in order[:_MOST]]
    left = sum(len(places[place]) for place in order[_MOST:])
    return "; ".join(clauses + ([f"and {left} more ranks elsewhere"] if left else []))


def _place(post: Post | None, is_gone: bool) -> tuple[int, str]:
    """(order, words) that ranks of one clause have in common."""
    if post is None:
        return 0, "not begun"
    if is_gone:
        return 1, post.phase
    if post.waits:
        return 3, post.phase
    return 2, f"{'past' if post.past else 'at'} {post.phase}{f' ({post.line})' if post.line else ''}"


def _clause(order: int, words: str, ranks: list[int], posts: Mapping[int, Post | None]) -> str:
    who, one = _named(ranks), len(ranks) == 1
    if order == 0:
        return f"{who} {'has' if one else 'have'} {words}"
    if order == 1:
        return f"{who} {'has' if one else 'have'} left or died; {'its' if one else 'their'} last phase was {words}"
    if order == 3:
        return f"{who} {'waits' if one else 'wait'} at {words}"
    still = max(post.seconds for rank in ranks if (post := posts[rank]))
    verdict = f" for {still:.0f} s, slow or stuck" if still >= _STILL_S else ""
    return f"{who} {'is' if one else 'are'} {words}{verdict}"


def _named(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(words)}"


def _main_line() -> tuple[str, bool]:
    """("layers.py:40 in forward", whether it waits for others) of the main thread, libraries' own lines passed over."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename.replace("\\", "/"), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    waits = any(part in file for file, _, _ in found[:_FRAMES] for part in _WAITING)
    own = next((entry for entry in found if "/lib/python" not in entry[0]), found[0] if found else ("", 0, ""))
    return (f"{Path(own[0]).name}:{own[1]} in {own[2]}" if own[0] else ""), waits
