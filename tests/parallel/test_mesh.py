"""Axis sizes, the worlds that a layout refuses, and where a rank stands."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from framework.core.errors import UsageError
from framework.core.runtime import Runtime
from framework.parallel.collectives import DATA
from framework.parallel.config import AXES, ParallelConfig
from framework.parallel.mesh import build_mesh
from tests.distributed import run_ranks

FSDP, DDP = ParallelConfig("fsdp", shard=0), ParallelConfig("ddp")
RECIPES = Path(__file__).resolve().parents[2] / "recipes/parallel"


def sizes(config: ParallelConfig, world: int) -> tuple[int, ...]:
    found = config.sizes(world)
    return tuple(found[axis] for axis in AXES)


def test_data_ranks_share_out_or_replicate_or_both() -> None:
    assert sizes(FSDP, 8) == (1, 1, 8, 1, 1)
    assert sizes(DDP, 8) == (1, 8, 1, 1, 1)
    assert sizes(ParallelConfig("hsdp", shard=4), 8) == (1, 2, 4, 1, 1)


def test_the_other_axes_take_their_ranks_from_the_data_s() -> None:
    all_axes = ParallelConfig("some", shard=2, tensor=2, context=3, pipeline=4)
    assert sizes(all_axes, 96) == (4, 2, 2, 3, 2)
    assert all_axes.data_size(96) == 4
    assert sizes(ParallelConfig("tp", tensor=0, pipeline=2), 8) == (2, 1, 1, 1, 4)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_word_fills_a_world_of_eight(path: Path) -> None:
    words = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert words["name"] == path.stem
    world = 1 if path.stem == "single" else 8
    product = 1
    for size in ParallelConfig(**words).sizes(world).values():
        product *= size
    assert product == world


@pytest.mark.parametrize(
    ("words", "world", "line"),
    [
        ({"name": "single"}, 4, "parallel=single runs on one process, the world has 4; choose parallel=fsdp or ddp"),
        (
            {"name": "tp", "tensor": 4},
            6,
            "parallel.tensor=4 needs a multiple of 4 processes, the world has 6; start it on 4 or 8",
        ),
        (
            {"name": "3d", "tensor": 2, "pipeline": 2},
            2,
            "parallel.tensor=2, parallel.pipeline=2 needs a multiple of 4 processes, the world has 2",
        ),
        ({"name": "hsdp", "shard": 8}, 12, "parallel.shard=8 does not divide 12 data ranks; choose 1, 2, 3, 4, 6, 12"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_with_what_would(words: dict[str, Any], world: int, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        ParallelConfig(**words).check_world(world)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"tensor": -1}, "parallel.tensor=-1 must be a number of ranks; 0 = all there are"),
        ({"tensor": 0, "context": 0}, "parallel.context=0 and parallel.tensor=0 cannot both be all there are"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(words: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        ParallelConfig("some", **words)
    assert str(caught.value).startswith(line)


def test_one_process_stands_alone() -> None:
    mesh = build_mesh(dataclasses.replace(FSDP, tensor=0), Runtime())
    assert (mesh.sharing, mesh.size("tensor"), mesh.place("data_shard"), mesh.lines("pipeline")) == (None, 1, 0, [[0]])
    assert mesh.speaks_for_row


STACKED = ParallelConfig("some", shard=0, tensor=2, pipeline=2)
PLACED = (STACKED, ParallelConfig("hsdp", shard=2, context=2), ParallelConfig("zero2", zero=2))


def _place(runtime: Runtime) -> dict[str, Any]:
    mesh, *others = (build_mesh(config, runtime) for config in PLACED)
    data = mesh.ranks(*DATA)
    sharing = mesh.sharing
    return {
        "axes": [mesh.place(axis) for axis in AXES],
        "data": (data.rank, data.size),
        "speaks": mesh.speaks_for_row,
        "pipelines": mesh.lines("pipeline"),
        "sharing": None if sharing is None else sharing.mesh.tolist(),
        "ends": mesh.pipeline_ends().size,
        "places": [{axis: each.place(axis) for axis in AXES} for each in (mesh, *others)],
    }


def test_tensor_ranks_stand_closest_and_stages_farthest() -> None:
    ranks = run_ranks(_place, 8)
    assert [rank["axes"] for rank in ranks] == [[p, 0, d, 0, t] for p in range(2) for d in range(2) for t in range(2)]
    assert [rank["data"] for rank in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)] * 2
    assert [rank["speaks"] for rank in ranks] == [True, False, True, False] + [False] * 4
    assert {str(rank["pipelines"]) for rank in ranks} == {"[[0, 4], [1, 5], [2, 6], [3, 7]]"}
    assert [rank["sharing"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3], [4, 6], [5, 7], [4, 6], [5, 7]]
    assert {rank["ends"] for rank in ranks} == {2}
    for number, rank in enumerate(ranks):  # what the map says before any mesh is there
        assert rank["places"] == [config.place(number, 8) for config in PLACED]


def _context(runtime: Runtime) -> list[list[int]] | None:
    sharing = build_mesh(ParallelConfig("cp", shard=0, context=2), runtime).sharing
    return None if sharing is None else sharing.mesh.tolist()


def test_context_ranks_share_out_parameters_as_data_ranks_do() -> None:
    assert run_ranks(_context, 4) == [[0, 1, 2, 3]] * 4
