"""The plan is put on a module in place: what is compiled, what is sharded, and that one process is left as it is."""

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

from framework.core.runtime import Runtime
from framework.parallel.apply import Plan, apply
from framework.parallel.config import ParallelConfig, Recompute
from framework.parallel.mesh import Mesh, build_mesh
from tests.distributed import run_ranks


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))


def test_blocks_are_compiled_in_place_and_keep_their_names() -> None:
    module = model()
    apply(module, Plan(["0", "1"]), Mesh(), compile=True)
    compiled = [name for name, part in module.named_modules() if part._compiled_call_impl is not None]
    assert compiled == ["0", "1"]
    assert set(dict(module.named_parameters())) == set(dict(model().named_parameters()))


def test_one_process_is_left_as_it_is() -> None:
    module = model()
    apply(module, Plan(["0"]), Mesh())
    assert not any(isinstance(part, torch.distributed.fsdp.FSDPModule) for part in module.modules())


def _sharded(runtime: Runtime) -> list[str]:
    mesh = build_mesh(ParallelConfig("fsdp", shard=0), runtime)
    module = model()
    apply(module, Plan(["0", "1"]), mesh)
    return [n for n, part in module.named_modules() if isinstance(part, torch.distributed.fsdp.FSDPModule)]


def test_blocks_and_root_are_sharded() -> None:
    assert run_ranks(_sharded, 2) == [["", "0", "1"]] * 2


def test_a_plan_exchanges_and_drops_parts_before_anything_else() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "rows": nn.ModuleDict({"0": nn.Linear(2, 2), "1": nn.Linear(2, 2)})})
    parts = apply(module, Plan(["rows.1"], exchanged={"a": nn.Identity}, dropped=["rows.0"]), Mesh())
    assert [name for name, _ in module.named_parameters()] == ["rows.1.weight", "rows.1.bias"]
    assert isinstance(module["a"], nn.Identity)
    assert parts["rows.1.weight"].box == ((0, 2), (0, 2))


@pytest.mark.parametrize("again", list(Recompute))
def test_recomputed_blocks_give_the_same_bits(again: Recompute) -> None:
    torch.manual_seed(0)
    plain, module = (
        nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4))) for _ in "ab"
    )
    module.load_state_dict(plain.state_dict())
    apply(module, Plan(["0", "1"]), Mesh(), again=again)
    x = torch.randn(3, 4)
    for each in (plain, module):
        each(x).square().sum().backward()
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


def _kept(again: Recompute) -> int:
    """Bytes that the graph of one block holds."""
    module = nn.Sequential(nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.GELU()))))
    apply(module, Plan(["0"]), Mesh(), again=again)
    held: dict[int, int] = {}
    own = {p.data_ptr() for p in module.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(torch.randn(256, 64, requires_grad=True))
    return sum(held.values())


def test_what_is_computed_again_is_not_kept() -> None:
    assert _kept(Recompute.FULL) == 256 * 64 * 4  # the block's input alone
    assert _kept(Recompute.NONE) > 8 * _kept(Recompute.FULL) - 1
