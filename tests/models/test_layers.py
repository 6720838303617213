"""Strict linear maps and activations: the same values, and bits that do not depend on the batch; norms by config."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from framework.core.runtime import num_threads
from framework.models.config import Activation, ModelConfig, Norm
from framework.models.layers import Linear, RMSNorm, activation, build_norm, strict_activation

PLAIN = [Activation.GELU, Activation.GELU_TANH, Activation.RELU]
SIZES = [(32, 40), (48, 301), (96, 256), (256, 96), (96, 2500), (40, 7), (8, 1), (1024, 64)]


@pytest.mark.parametrize(("threads", "sizes", "bias"), list(itertools.product([1, 2], SIZES, [False, True])))
def test_strict_rows_do_not_depend_on_their_number(threads: int, sizes: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    linear = Linear(*sizes, bias=bias, strict=True)
    x = torch.randn(40, 8, sizes[0])
    with num_threads(threads), torch.no_grad():
        whole = linear(x)
        torch.testing.assert_close(whole, F.linear(x, linear.weight, linear.bias), rtol=1e-5, atol=1e-5)
        for rows, columns in ((1, 1), (1, 5), (3, 3), (5, 8), (39, 7)):
            assert torch.equal(linear(x[:rows, :columns]), whole[:rows, :columns])
            assert torch.equal(linear(x[-rows:, -columns:]), whole[-rows:, -columns:])


def test_strict_linear_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    linear = Linear(5, 3, bias=True).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    leaves = (x, linear.weight, linear.bias)
    plain = torch.autograd.grad(linear(x).square().sum(), leaves)
    linear.strict = True
    for a, b in zip(plain, torch.autograd.grad(linear(x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", PLAIN)
def test_strict_activations_are_the_same_functions(kind: Activation) -> None:
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64, requires_grad=True)
    plain, strict = activation(x, kind), strict_activation(x, kind)
    torch.testing.assert_close(plain, strict, rtol=0, atol=1e-13)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (plain, strict)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "threads"), list(itertools.product(PLAIN, [1, 2])))
def test_strict_activations_do_not_depend_on_an_elements_place(kind: Activation, threads: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(70001) * 3
    with num_threads(threads):
        whole = strict_activation(x, kind)
        for start, size in ((0, 1), (1, 7), (3, 33), (5, 1000), (35001, 35000)):
            part = slice(start, start + size)
            assert torch.equal(strict_activation(x[part].clone(), kind), whole[part])


def test_norms_are_the_configured_ones() -> None:
    config = ModelConfig(vocab_size=2, hidden_size=8, norm_eps=0.5)
    rms, layer = build_norm(config), build_norm(ModelConfig(vocab_size=2, hidden_size=8, norm_eps=0.5, norm=Norm.LAYER))
    assert isinstance(rms, RMSNorm)
    assert isinstance(layer, torch.nn.LayerNorm)
    assert rms.eps == layer.eps == 0.5
