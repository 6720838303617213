"""What the map of ranks says of a layout."""

from pathlib import Path

import pytest
import yaml

from framework.core.errors import UsageError
from framework.parallel.config import ParallelConfig
from framework.parallel.words import layout_in_words, node_in_words

THREE = ParallelConfig("3d", shard=0, tensor=2, pipeline=2)
RECIPES = Path(__file__).resolve().parents[2] / "recipes/parallel"


def word(name: str) -> ParallelConfig:
    return ParallelConfig(**yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("name", "world", "line"),
    [
        ("3d", 8, "3d = pipeline 2 x shard 2 x tensor 2"),
        ("hsdp", 16, "hsdp = replicate 2 x shard 8"),
        ("cp", 4, "cp = context 4"),
        ("ddp", 1, "ddp = one process"),
        ("zero1", 2, "zero1 = data 2, ZeRO-1 shares out states"),
        (
            "zero3_offload",
            1,
            "zero3_offload = one process, ZeRO-3 shares out states, gradients and parameters, "
            "what is not in use waits in CPU memory",
        ),
    ],
)
def test_a_layout_says_its_axes_outermost_first(name: str, world: int, line: str) -> None:
    assert layout_in_words(word(name), world) == line


def test_a_world_that_does_not_fit_has_no_words() -> None:
    with pytest.raises(UsageError, match="needs a multiple of 4 processes, the world has 6"):
        layout_in_words(THREE, 6)


def test_a_node_says_where_its_ranks_stand_in_the_layout() -> None:
    devices = {4: "cuda:0", 5: "cuda:1"}
    here = "rank 4 on cuda:0 at pipeline 1 shard 0 tensor 0, rank 5 on cuda:1 at pipeline 1 shard 0 tensor 1"
    assert node_in_words(devices, THREE, 8) == here
    assert node_in_words(devices, None, 8) == "rank 4 on cuda:0, rank 5 on cuda:1"
    assert node_in_words({0: "cpu"}, ParallelConfig("ddp"), 1) == "rank 0 on cpu"
    assert node_in_words({1: "cpu"}, ParallelConfig("zero2", zero=2), 2) == "rank 1 on cpu at data 1"
