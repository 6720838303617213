"""Matrices in 4 bits: bitsandbytes' own layer, NormalFloat by hand, gradients, what is held, and what is refused."""

import builtins
from typing import Any

import pytest
import torch

from framework.core.errors import UsageError
from framework.models.quantised import Quantised, library

bitsandbytes = pytest.importorskip("bitsandbytes")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def held(weight: torch.Tensor) -> Quantised:
    made = Quantised(weight.shape)
    made.take(weight)
    return made


def test_products_and_gradients_are_those_of_bitsandbytes_own_layer() -> None:
    """Linear4bit with the same choices (nf4, blocks of 64, scales quantised too), computing in fp32."""
    weight, x = drawn(48, 72), drawn(5, 72).requires_grad_()
    theirs = bitsandbytes.nn.Linear4bit(72, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    theirs = theirs.to("cpu")  # which quantises
    y, expected = held(weight)(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    weights = drawn(5, 48)
    ours, their = (torch.autograd.grad((z * weights).sum(), x)[0] for z in (y, expected))
    torch.testing.assert_close(ours, their, rtol=0, atol=1e-6)


def test_normal_floats_come_back() -> None:
    """A block of the sixteen numbers of the paper's appendix E times its scale is held to the scale's own rounding."""
    levels = torch.tensor([
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
        0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ])  # fmt: skip
    block = 0.3 * levels.repeat(4)
    torch.testing.assert_close(held(block.view(1, 64)).weight(torch.float32)[0], block, rtol=0.01, atol=1e-6)


def test_a_weight_takes_about_four_bits_and_errs_little() -> None:
    weight = drawn(256, 512)
    matrix = held(weight)
    assert 4.0 <= 8 * matrix.bytes / weight.numel() <= 4.2
    error = (matrix.weight(torch.float32) - weight).norm() / weight.norm()
    assert 0.05 < error < 0.12
    assert matrix.weight(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(matrix.weight(torch.float32), held(weight).weight(torch.float32))


def test_nothing_of_a_matrix_waits_for_backward() -> None:
    """What autograd keeps of a product is no tensor of its size."""
    matrix, kept = held(drawn(64, 64)), list[int]()
    x = drawn(2, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = matrix(x)
    assert max(kept, default=0) < 64 * 64
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, matrix.weight(torch.float32).sum(0).expand(2, -1))


def test_a_missing_bitsandbytes_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=r'pip install "framework\[quantised\]"'):
        library()
