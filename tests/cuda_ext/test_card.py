"""What only a card can show, of every op both ways: it goes into a CUDA graph, on the current stream, on its inputs'
own device, and never makes the host wait. launch/gpu runs this; without a card the calls alone run, on the emulator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.adamw.op import adamw, multi_tensor_norm
from cuda_ext.gae.op import gae
from cuda_ext.layer_norm.op import layer_norm
from cuda_ext.linear_log_probs.op import linear_scores
from cuda_ext.linear_log_probs.token_loss import linear_token_loss
from cuda_ext.matmul.op import matmul
from cuda_ext.moe.op import permute, unpermute
from cuda_ext.rms_norm.op import rms_norm
from cuda_ext.rotary.op import rotary
from cuda_ext.sampling.op import sample
from cuda_ext.swiglu.op import swiglu
from tests.cuda_ext.emulated import DEVICE, draw, emulated

ROWS, WIDTH, VOCABULARY = 16, 64, 96
Call = Callable[[Tensor], tuple[Tensor, ...]]
on_card = pytest.mark.skipif(DEVICE == "cpu", reason="no card: CUDA_EXT_DEVICE=cuda takes one")


def calls(device: str) -> dict[str, Call]:
    """Of each op a function of x[ROWS, WIDTH] to all that it gives; what else it takes is there before."""

    def drawn(*shape: int, seed: int) -> Tensor:
        return draw(*shape, seed=seed).to(device)

    w, b, other = drawn(WIDTH, seed=1), drawn(WIDTH, seed=2), drawn(ROWS, WIDTH, seed=3)
    head, cube = drawn(VOCABULARY, WIDTH, seed=4), drawn(WIDTH, WIDTH, seed=5)
    labels, mask = torch.arange(ROWS, device=device) % VOCABULARY, other > -1
    uniforms, weights = torch.rand(ROWS, device=device), drawn(ROWS, 1, seed=6)
    cos, sin = drawn(1, 4, 16, seed=7).cos(), drawn(1, 4, 16, seed=7).sin()
    rows = torch.arange(ROWS, device=device).flip(0).unsqueeze(1)

    def update(x: Tensor) -> tuple[Tensor, ...]:
        states = [x.detach().clone(), torch.zeros_like(x), torch.zeros_like(x)]
        norm, bad = multi_tensor_norm([x.detach()])
        adamw(
            [states[0]], [other], [states[1]], [states[2]], step=1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8,
            weight_decay=0.1, clip=1 / norm, non_finite=bad,
        )  # fmt: skip
        return norm, *states

    def loss(log_probs: Tensor, entropy: Tensor | None, _: Any) -> tuple[Tensor, dict[str, Any]]:
        assert entropy is not None
        return (log_probs.square() + entropy).sum(), {}

    return {
        "rms_norm": lambda x: both_ways(rms_norm(x, w, 1e-5, other), x),
        "layer_norm": lambda x: both_ways(layer_norm(x, w, b, 1e-5, other), x),
        "swiglu": lambda x: both_ways((swiglu(x, other),), x),
        "rotary": lambda x: both_ways((rotary(x.view(4, 4, 4, 16), cos, sin),), x),
        "gae": lambda x: gae(x.detach(), other, mask, 0.9, 0.8),
        "adamw": update,
        "sampling": lambda x: sample(x.detach(), uniforms, top_k=5)[:2],
        "moe": lambda x: both_ways((unpermute(permute(x, rows, ROWS), rows, weights),), x),
        "matmul": lambda x: (matmul(x.detach(), cube),),
        "linear_log_probs": lambda x: both_ways(linear_scores(x, head, labels), x),
        "pointwise": lambda x: both_ways(linear_token_loss(x, head, labels, loss, None, with_entropy=True)[:1], x),
    }


def both_ways(outputs: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
    """All outputs, and x's gradient from their sum."""
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in outputs), x)  # type: ignore[arg-type]
    return *(y.detach() for y in outputs), gradient


def leaf(seed: int, device: str = DEVICE) -> Tensor:
    return draw(ROWS, WIDTH, seed=seed).to(device).requires_grad_()


@pytest.mark.parametrize("op", calls("cpu"))
def test_emulated_what_is_asked_of_a_card_depends_on_its_input(op: str) -> None:
    call = calls(DEVICE)[op]
    with emulated():
        one, same, other = (call(leaf(seed)) for seed in (8, 8, 9))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_kernel_is_asked() -> None:
    assert set(calls("cpu")) == {*library.kernels(), "pointwise"}


@on_card
@pytest.mark.parametrize("op", calls("cpu"))
def test_card_a_graph_gives_the_same_bits_of_other_numbers(op: str) -> None:
    cuda, call, x, other = torch.get_device_module("cuda"), calls(DEVICE)[op], leaf(8), leaf(9)
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with emulated(), cuda.stream(side):
        call(x)  # what is made at a first call must not be made while a graph records
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with emulated(), cuda.graph(graph):
        recorded = call(x)
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    with emulated():
        assert all(torch.equal(a, b) for a, b in zip(recorded, call(other), strict=True))


@on_card
@pytest.mark.parametrize("op", calls("cpu"))
def test_card_it_waits_for_its_own_stream(op: str) -> None:
    """On a stream of its own x is late: a kernel on another stream would read what stood there before."""
    cuda, call, x, late = torch.get_device_module("cuda"), calls(DEVICE)[op], leaf(8), leaf(9)
    with emulated():
        call(x)
        expected = call(late)
        cuda.synchronize()
        with cuda.stream(cuda.Stream()):
            cuda._sleep(200_000_000)
            with torch.no_grad():
                x.copy_(late)
            found = call(x)
        cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_card
@pytest.mark.parametrize("op", calls("cpu"))
def test_card_the_host_never_waits(op: str) -> None:
    cuda, call, x = torch.get_device_module("cuda"), calls(DEVICE)[op], leaf(8)
    with emulated():
        call(x)
        cuda.set_sync_debug_mode("error")
        try:
            call(x)
        finally:
            cuda.set_sync_debug_mode("default")


@on_card
@pytest.mark.parametrize("op", calls("cpu"))
def test_card_it_runs_on_its_inputs_device(op: str) -> None:
    cuda = torch.get_device_module("cuda")
    if cuda.device_count() < 2:
        pytest.skip("one card")
    with emulated():
        here = calls("cuda:0")[op](leaf(8, "cuda:0"))
        there = calls("cuda:1")[op](leaf(8, "cuda:1"))  # the current device stays cuda:0
    assert all(x.device.index == 1 for x in there)
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(here, there, strict=True))
