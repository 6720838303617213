"""Which part of a parameter is where: boxes that tile the whole, one owner for each, under FSDP and replicated FSDP."""

from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # imported once, before the ranks are forked
from torch import Tensor, nn

from framework.core.records import whole
from framework.core.runtime import Runtime
from framework.parallel.apply import Plan, apply
from framework.parallel.config import ParallelConfig
from framework.parallel.mesh import Mesh, build_mesh
from framework.parallel.shard import Part, full, local, reshard
from tests.distributed import run_ranks


class Tower(nn.Module):
    """Two blocks and a root; 5 rows over 4 ranks leave one rank without any."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"0": nn.Linear(3, 5), "1": nn.Linear(5, 5)})
        self.out = nn.Linear(5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = torch.tanh(block(x))
        return self.out(x)


def values(name: str, shape: torch.Size) -> Tensor:
    return torch.arange(shape.numel(), dtype=torch.float64).view(shape) / 10 + len(name)


def tower(mesh: Mesh, compute: torch.dtype = torch.float64) -> tuple[Tower, dict[str, Part]]:
    with torch.device("meta"):
        module = Tower().double()
    parts = apply(module, Plan(["blocks.0", "blocks.1"]), mesh, compute=compute)
    module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        index = tuple(slice(start, start + length) for start, length in parts[name].box_of(parameter))
        local(parameter).copy_(values(name, parameter.shape)[index])
    return module, parts


def _lay_out(runtime: Runtime, shard: int) -> dict[str, Any]:
    (module, parts), (alone, _) = tower(build_mesh(ParallelConfig("some", shard=shard), runtime)), tower(Mesh())
    x = torch.full((2, 3), 0.1 * (runtime.rank + 1), dtype=torch.float64)
    boxes = {n: (parts[n].box_of(p), parts[n].is_owner(p)) for n, p in module.named_parameters()}
    equal = all(torch.equal(full(p), values(n, p.shape)) for n, p in module.named_parameters())
    with torch.no_grad():
        module(x)
    held = module.out.weight.shape == local(module.out.weight).shape  # the root keeps its parameters gathered
    reshard(module)
    back = module.out.weight.placements[-1].is_shard()  # type: ignore[attr-defined]
    module(x).sum().backward()
    for rank in range(runtime.world_size):
        alone(torch.full((2, 3), 0.1 * (rank + 1), dtype=torch.float64)).sum().backward()
    pairs = zip(module.parameters(), alone.parameters(), strict=True)
    close = all(p.grad is not None and q.grad is not None and torch.allclose(full(p.grad), q.grad) for p, q in pairs)
    return {"boxes": boxes, "equal": equal, "held": held, "back": back, "close": close}


@pytest.fixture(scope="module", params=[4, 2, 1], ids=["fsdp", "hsdp", "replicated"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_lay_out, 4, request.param)


def test_owned_boxes_tile_every_parameter(ranks: list[dict[str, Any]]) -> None:
    for name, parameter in Tower().named_parameters():
        cover = torch.zeros(parameter.shape, dtype=torch.int)
        for rank in ranks:
            box, owned = rank["boxes"][name]
            cover[tuple(slice(start, start + length) for start, length in box)] += owned
        assert bool((cover == 1).all()), name


def test_filled_box_by_box_the_whole_comes_back(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["equal"] for rank in ranks)


def test_gradients_are_summed_and_not_averaged(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["close"] for rank in ranks)


def test_gathered_parameters_are_dropped_again(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["held"] and rank["back"] for rank in ranks)


def test_a_plain_tensor_is_where_the_cut_left_it_and_its_speaker_s() -> None:
    x = torch.ones(2, 3)
    assert Part((2, 3), whole(x.shape)).box_of(x) == whole(x.shape)
    assert Part((4, 3), ((2, 2), (0, 3))).box_of(x) == ((2, 2), (0, 3))
    assert [Part((2, 3), whole(x.shape), speaks=speaks).is_owner(x) for speaks in (True, False)] == [True, False]
    assert full(x) is not None
    assert local(x).data_ptr() == x.data_ptr()
