"""The plan is put on a module in place: what is compiled, what is sharded, and that one process is left as it is."""

import torch
import torch.distributed.fsdp
from torch import nn

from framework.core.runtime import Runtime
from framework.parallel.apply import apply
from framework.parallel.config import ParallelConfig, Shard
from framework.parallel.mesh import build_mesh
from tests.distributed import run_ranks


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))


def test_blocks_are_compiled_in_place_and_keep_their_names() -> None:
    module = apply(model(), ["0", "1"], None, compile=True, compute=torch.float32)
    compiled = [name for name, part in module.named_modules() if part._compiled_call_impl is not None]
    assert compiled == ["0", "1"]
    assert set(dict(module.named_parameters())) == set(dict(model().named_parameters()))


def test_one_process_is_left_as_it_is() -> None:
    module = apply(model(), ["0"], None, compile=False, compute=torch.float32)
    assert not any(isinstance(part, torch.distributed.fsdp.FSDPModule) for part in module.modules())


def _sharded(runtime: Runtime) -> list[str]:
    mesh = build_mesh(ParallelConfig("fsdp", Shard.FULL), runtime)
    module = apply(model(), ["0", "1"], mesh, compile=False, compute=torch.float32)
    return [n for n, part in module.named_modules() if isinstance(part, torch.distributed.fsdp.FSDPModule)]


def test_blocks_and_root_are_sharded() -> None:
    assert run_ranks(_sharded, 2) == [["", "0", "1"]] * 2
