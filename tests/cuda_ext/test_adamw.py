"""AdamW: one step by hand, torch's own over many, and bits that do not depend on an element's place in a shard."""

import pytest
import torch
from torch import Tensor

from cuda_ext.adamw import op, reference
from cuda_ext.adamw.op import adamw, multi_tensor_norm
from framework.core.runtime import num_threads

HYPER = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def test_the_first_step_by_hand() -> None:
    """After step 1 both corrected moments are g and g^2, so p <- p (1 - 0.01 * 0.1) - 0.01 sign(g)."""
    p, m, v = torch.tensor([2.0, -1.0]).double(), torch.zeros(2).double(), torch.zeros(2).double()
    g = torch.tensor([4.0, -0.5]).double()
    adamw([p], [g], [m], [v], step=1, **HYPER)
    torch.testing.assert_close(
        p, torch.tensor([2 * 0.999 - 0.01, -0.999 + 0.01], dtype=torch.float64), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(m, 0.1 * g)
    torch.testing.assert_close(v, 0.05 * g * g)
    assert g.tolist() == [4.0, -0.5]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_torch_over_twenty_steps(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    start = [torch.randn(3, 5, dtype=dtype), torch.randn(7, dtype=dtype)]
    theirs = [p.clone().requires_grad_() for p in start]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours = [p.clone() for p in start]
    averages, squares = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    for step in range(1, 21):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        adamw(ours, grads, averages, squares, step=step, **HYPER)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bits_of_an_element_do_not_depend_on_its_place(threads: int) -> None:
    torch.manual_seed(0)
    size = 70001
    state = [torch.randn(size), torch.randn(size) * 1e-2, torch.randn(size) * 1e-2, torch.rand(size) * 1e-4]

    def updated(part: slice) -> list[Tensor]:
        p, g, m, v = (x[part].clone() for x in state)
        adamw([p], [g], [m], [v], step=3, **HYPER)
        return [p, m, v]

    with num_threads(threads):
        whole = updated(slice(None))
        for start, length in ((0, 1), (1, 7), (3, 33), (17, 31), (5, 1000), (35001, 35000), (0, 35001), (2, 69999)):
            part = slice(start, start + length)
            assert all(torch.equal(a, b[part]) for a, b in zip(updated(part), whole, strict=True))


@pytest.mark.parametrize("contiguous", [True, False])
def test_stretch_by_stretch_gives_the_definition_s_bits(monkeypatch: pytest.MonkeyPatch, contiguous: bool) -> None:
    monkeypatch.setattr(op, "_STRETCH", 5)
    torch.manual_seed(0)
    ours = [[torch.rand(7, 3) for _ in range(2)] + [torch.rand(1), torch.rand(0)] for _ in range(4)]
    if not contiguous:
        ours[1][0], ours[2][1] = torch.rand(3, 7).t(), torch.rand(3, 7).t()
    wanted = [[tensor.clone() for tensor in tensors] for tensors in ours]
    adamw(*ours, step=3, **HYPER)
    reference.adamw(*wanted, step=3, **HYPER)
    assert all(torch.equal(a, b) for mine, theirs in zip(ours, wanted) for a, b in zip(mine, theirs))


def test_nothing_to_update_is_no_error() -> None:
    adamw([], [], [], [], step=1, **HYPER)


def test_what_the_gradient_is_multiplied_by_and_the_copy_by_hand() -> None:
    """g = 8 * 1/4 * 1/2 = 1: m = 0.1, v = 0.05, and p <- 2 * 0.999 - 0.01, in bf16 1.9844."""
    p, m, v = torch.tensor([2.0]), torch.zeros(1), torch.zeros(1)
    copy = torch.zeros(1, dtype=torch.bfloat16)
    grad = torch.tensor([8.0])
    adamw([p], [grad], [m], [v], step=1, **HYPER, unscale=0.25, clip=torch.tensor(0.5), copies=[copy])
    torch.testing.assert_close(torch.cat((p, m, v)), torch.tensor([1.988, 0.1, 0.05]))
    assert copy.tolist() == [1.984375]
    assert grad.tolist() == [8.0]


@pytest.mark.parametrize("flag", [1.0, torch.nan])
def test_nothing_is_written_where_the_gradient_is_not_finite(flag: float) -> None:
    state = [[torch.ones(3)] for _ in range(4)]
    adamw(*state, step=1, **HYPER, non_finite=torch.tensor(flag), copies=[torch.ones(3).bfloat16()])
    assert all((x == 1).all() for (x,) in state)
    adamw(*state, step=1, **HYPER, non_finite=torch.tensor(0.0))
    assert (state[0][0] != 1).all()


def test_gradients_in_bf16_are_widened_first() -> None:
    torch.manual_seed(0)
    narrow = torch.randn(50).bfloat16()
    results = []
    for grad in (narrow, narrow.float()):
        state = [torch.ones(50), torch.zeros(50), torch.zeros(50)]
        adamw([state[0]], [grad], [state[1]], [state[2]], step=1, **HYPER)
        results.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_norm_of_many_tensors() -> None:
    """sqrt(9 + 16 + 144) = 13, torch's own, and 1 where it is not finite."""
    norm, non_finite = multi_tensor_norm([torch.tensor([3.0]), torch.tensor([[4.0, 12.0]])])
    assert (float(norm), float(non_finite)) == (13.0, 0.0)
    assert float(multi_tensor_norm([torch.tensor([26.0])], unscale=0.5)[0]) == 13.0
    tensors = [torch.randn(3, 5), torch.randn(70)]
    torch.testing.assert_close(multi_tensor_norm(tensors)[0], torch.nn.utils.get_total_norm(tensors))
    for bad in (torch.nan, torch.inf, 1e30):
        assert float(multi_tensor_norm([*tensors, torch.tensor([bad])])[1]) == 1
    assert float(multi_tensor_norm([])[0]) == 0
