"""AdamW against torch's own, against fp64 arithmetic written out, and against itself cut into shards."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from framework.optim import adamw
from framework.optim.adamw import AdamW
from framework.optim.config import OptimConfig

SHAPES = {"embedding.weight": (37, 8), "layers.0.mlp.up.weight": (24, 8), "layers.0.mlp_norm.weight": (8,)}
CONFIG = OptimConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
RATES = [0.01, 0.03, 0.02, 0.0, 0.01]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def build(parameters: Mapping[str, Tensor]) -> AdamW:
    return AdamW(parameters, {name: torch.Size(shape) for name, shape in SHAPES.items()}, CONFIG)


def run(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    optimizer = build(parameters)
    for number, rate in enumerate(RATES):
        gradients = tensors(100 + number, next(iter(parameters.values())).dtype)
        optimizer.step(gradients, rate)
    assert optimizer.updates == len(RATES)
    return parameters


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equal_to_torch(dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = run(tensors(0, dtype)), tensors(0, dtype)
    matrix = ["layers.0.mlp.up.weight"]
    groups = [
        {"params": [theirs[n] for n in matrix], "weight_decay": 0.1},
        {"params": [theirs[n] for n in theirs if n not in matrix], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for number, rate in enumerate(RATES):
        for name, gradient in tensors(100 + number, dtype).items():
            theirs[name].grad = gradient
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=tolerance)
        assert not torch.equal(parameter, tensors(0, dtype)[name])


def test_equal_to_the_paper_in_fp64() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, element by element in Python floats."""
    ours = run(tensors(0))
    name, place = "layers.0.mlp.up.weight", (3, 5)
    p, m, v = float(tensors(0)[name][place]), 0.0, 0.0
    for t, rate in enumerate(RATES, start=1):
        g = float(tensors(99 + t)[name][place])
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p -= rate * ((m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-8) + 0.1 * p)
    assert float(ours[name][place]) == pytest.approx(p, abs=1e-6)


def test_a_shard_gets_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut unevenly, one part empty, and in many small buckets: the same bits."""
    whole = run(tensors(0))
    monkeypatch.setattr(adamw, "_BUCKET", 50)
    for start, stop in ((0, 5), (5, 24), (24, 24)):
        part = {name: tensor[start:stop].clone() for name, tensor in tensors(0).items()}
        optimizer = build(part)
        for number, rate in enumerate(RATES):
            optimizer.step({n: g[start:stop] for n, g in tensors(100 + number).items()}, rate)
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[name][start:stop]), name


def test_states_are_live_and_reset_forgets_them() -> None:
    optimizer = build(tensors(0))
    assert {(kind, name) for kind, name, _ in optimizer.states()} == {(k, n) for k in adamw.KINDS for n in SHAPES}
    optimizer.step(tensors(1), 0.1)
    assert all(state.abs().sum() > 0 for _, _, state in optimizer.states())
    optimizer.reset()
    assert optimizer.updates == 0
    assert all(state.abs().sum() == 0 for _, _, state in optimizer.states())
