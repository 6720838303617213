"""Axis sizes, and the worlds that a layout refuses."""

import pytest

from framework.core.errors import UsageError
from framework.core.runtime import Runtime
from framework.parallel.config import ParallelConfig, Shard
from framework.parallel.mesh import DATA, axis_sizes, build_mesh
from tests.distributed import run_ranks

FSDP, DDP = ParallelConfig("fsdp", Shard.FULL), ParallelConfig("ddp", Shard.NONE)


def test_data_ranks_either_share_out_or_replicate() -> None:
    assert axis_sizes(FSDP, 8) == (1, 8)
    assert axis_sizes(DDP, 8) == (8, 1)


@pytest.mark.parametrize("config", [ParallelConfig(), FSDP, DDP], ids=lambda config: config.name)
def test_one_process_needs_no_mesh(config: ParallelConfig) -> None:
    assert build_mesh(config, Runtime()) is None


def test_single_refuses_a_larger_world_by_name() -> None:
    with pytest.raises(
        UsageError, match=r"parallel=single runs on one process, the world has 4; choose parallel=fsdp or ddp"
    ):
        build_mesh(ParallelConfig(), Runtime(rank=1, world_size=4))


def _shape(runtime: Runtime) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    mesh = build_mesh(FSDP, runtime)
    assert mesh is not None
    return tuple(mesh.mesh_dim_names or ()), tuple(mesh.shape), mesh.get_local_rank("data_shard")


def test_the_axes_have_names() -> None:
    assert run_ranks(_shape, 2) == [(DATA, (1, 2), 0), (DATA, (1, 2), 1)]
