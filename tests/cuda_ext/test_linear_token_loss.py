"""The pointwise loss whose gradient is made between the products: against autograd through `linear_log_probs`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_ext.linear_log_probs.op import linear_log_probs
from cuda_ext.linear_log_probs.token_loss import Metrics, linear_token_loss
from tests.cuda_ext.emulated import draw, emulated, same_bits, whole_numbers

TOKENS = 9.0


def clipped(log_probs: Tensor, entropy: Tensor | None, rows: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
    """PPO's clipped ratio with an entropy bonus, and the share of clipped tokens."""
    ratio = (log_probs - rows["old"]).exp()
    gains = torch.minimum(ratio * rows["advantages"], ratio.clamp(0.8, 1.2) * rows["advantages"])
    loss = -(gains * rows["mask"]).sum() / TOKENS
    if entropy is not None:
        loss = loss - 0.1 * (entropy * rows["mask"]).sum() / TOKENS
    return loss, {"clipped": (((ratio - 1).abs() > 0.2).to(loss).sum(), rows["mask"].sum())}


def inputs(rows: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    leaves = [draw(rows, 12, dtype=dtype, seed=1), draw(33, 12, dtype=dtype, seed=2), draw(33, dtype=dtype, seed=3)]
    targets = whole_numbers(30, rows, seed=1)
    log_probs, _ = linear_log_probs(leaves[0], leaves[1], targets, leaves[2], 0.8, 30, soft_cap=6.0)
    wide = log_probs.dtype
    old = log_probs + 0.3 * draw(rows, seed=4).to(wide)
    mask = (torch.arange(rows) % 5 != 2).to(wide)
    return leaves, targets, {"old": old, "advantages": draw(rows, seed=5).to(wide), "mask": mask}


def through_all(
    leaves: list[Tensor], targets: Tensor, rows: dict[str, Tensor], entropy: bool
) -> tuple[Tensor, Metrics]:
    """The plain way: all log-probs, then the loss."""
    scores = linear_log_probs(leaves[0], leaves[1], targets, leaves[2], 0.8, 30, entropy, 6.0)
    return clipped(*scores, rows)


def in_chunks(leaves: list[Tensor], targets: Tensor, rows: dict[str, Tensor], entropy: bool, chunk: int = 4,
              loss: Any = clipped) -> tuple[Tensor, Metrics]:  # fmt: skip
    return linear_token_loss(*leaves[:2], targets, loss, rows, leaves[2], 0.8, 30, entropy, 6.0, chunk)


def gradients(call: Any, leaves: list[Tensor], *words: Any) -> list[Tensor]:
    """The loss, and the gradients of twice the loss."""
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    loss, metrics = call(own, *words)
    return [loss.detach(), *metrics["clipped"], *torch.autograd.grad(2 * loss, own)]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_equals_autograd_through_all_log_probs(count: int, entropy: bool) -> None:
    values = inputs(count, torch.float64)
    for a, b in zip(gradients(in_chunks, *values, entropy), gradients(through_all, *values, entropy), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_emulated_equals_autograd_through_all_log_probs(dtype: torch.dtype, tolerance: float) -> None:
    values = inputs(11, dtype)
    plain = gradients(through_all, *values, True)
    with emulated():
        ours = gradients(in_chunks, *values, True)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_emulated_bits_depend_on_no_schedule() -> None:
    values = inputs(6, torch.bfloat16)
    same_bits(lambda: tuple(x[None] for x in gradients(in_chunks, *values, True)))


def test_no_gradient_no_work_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, targets, rows = inputs(6, torch.float64)
    monkeypatch.setattr("cuda_ext.linear_log_probs.token_loss.reference.row_gradient", None)
    loss, _ = in_chunks(leaves, targets, rows, True)
    assert not loss.requires_grad
    with torch.no_grad():
        again, _ = in_chunks([leaf.requires_grad_() for leaf in leaves], targets, rows, True)
    assert torch.equal(loss, again)


def test_a_frozen_head_has_no_gradient_of_its_own() -> None:
    leaves, targets, rows = inputs(6, torch.float64)
    whole = gradients(in_chunks, leaves, targets, rows, True)
    loss, _ = in_chunks([leaves[0].requires_grad_(), *leaves[1:]], targets, rows, True)
    (2 * loss).backward()
    assert leaves[0].grad is not None
    assert torch.equal(leaves[0].grad, whole[3])


def test_nothing_at_all_and_a_chunk_in_which_no_label_counts() -> None:
    leaves, targets, rows = inputs(8, torch.float64)
    empty = gradients(in_chunks, [leaves[0][:0], *leaves[1:]], targets[:0], {k: v[:0] for k, v in rows.items()}, True)
    assert empty[0] == 0
    assert all((x == 0).all() for x in empty[3:])

    def constant(log_probs: Tensor, entropy: Tensor | None, rows: Any) -> tuple[Tensor, Metrics]:
        return log_probs.new_tensor(1.0), {"clipped": (log_probs.new_tensor(len(log_probs)), log_probs.new_tensor(1.0))}

    loss, clipped_, chunks, *found = gradients(lambda *a: in_chunks(*a, loss=constant), leaves, targets, rows, False)
    assert (loss, clipped_, chunks) == (2, 8, 2)
    assert all((x == 0).all() for x in found)
