"""NVIDIA apex, played by a stand-in with its signatures: norms and updates are the definition's; what is not apex, or
no tensor for it, is told apart. Not run against the real library."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_ext import apex, dispatch
from cuda_ext.adamw import reference as adamw_reference
from cuda_ext.adamw.op import adamw
from cuda_ext.layer_norm.op import layer_norm
from cuda_ext.rms_norm.op import rms_norm
from tests.cuda_ext.standing_in import FOLDER, standing_in
from tests.cuda_ext.test_flash import said

SETTINGS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer without bias"])
def test_norms_and_their_gradients_are_the_definitions(kind: str, with_residual: bool) -> None:
    inputs = [x.requires_grad_() for x in drawn((3, 5, 8), (8,), (8,), (3, 5, 8))]
    x, weight, bias, residual = inputs
    further = (residual,) if with_residual else ()

    def run() -> tuple[Tensor, ...]:
        if kind == "rms":
            y = rms_norm(x, weight, 1e-5, *further)
        else:
            y = layer_norm(x, weight, bias if kind == "layer" else None, 1e-5, *further)
        return y if isinstance(y, tuple) else (y,)

    theirs = run()
    with standing_in("apex"), dispatch.preferring(norm="apex"):
        ours = run()
        assert said("rms_norm" if kind == "rms" else "layer_norm") == "NVIDIA apex"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    weights = drawn(*(y.shape for y in ours), seed=1)
    gradients = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(side, weights, strict=True)), inputs, allow_unused=True)
        for side in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_sum_is_rounded_before_it_is_normalised_as_the_definition_does() -> None:
    x, residual = (part.bfloat16() for part in drawn((4, 64), (4, 64)))
    weight = torch.ones(64, dtype=torch.bfloat16)
    theirs = rms_norm(x, weight, 1e-5, residual)
    with standing_in("apex"), dispatch.preferring(norm="apex"):
        ours = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=0)


def test_other_dtypes_meet_in_the_wider_one_outside_of_autocast() -> None:
    (x, weight) = drawn((4, 64), (64,))
    theirs = rms_norm(x.bfloat16(), weight, 1e-5)
    with standing_in("apex"), dispatch.preferring(norm="apex"):
        with torch.autocast("cpu", torch.bfloat16):
            ours = rms_norm(x.bfloat16(), weight, 1e-5)
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)
        assert rms_norm(x, weight.bfloat16(), 1e-5).dtype == torch.float32


def steps(within: Any, number: int = 3, dtype: torch.dtype = torch.float32, **words: Any) -> list[list[Tensor]]:
    """(params, averages, averages of squares, copies) after some updates; an empty tensor is the last."""
    shapes = [(7, 3), (11,), (0,)]
    params, copies = drawn(*shapes), [torch.zeros(shape).bfloat16() for shape in shapes]
    states = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
    for step in range(1, number + 1):
        grads = [grad.to(dtype) for grad in drawn(*shapes, seed=step)]
        kept = [grad.clone() for grad in grads]
        with within():
            adamw(params, grads, *states, step=step, copies=copies, **SETTINGS, **words)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    return [params, *states, copies]


def by_apex() -> Any:
    class Within:
        def __enter__(self) -> None:
            self.library, self.choice = standing_in("apex"), dispatch.preferring(optimizer="apex")
            self.library.__enter__()
            self.choice.__enter__()

        def __exit__(self, *error: object) -> None:
            assert said("adamw") == "NVIDIA apex"
            self.choice.__exit__(None, None, None)
            self.library.__exit__(None, None, None)

    return Within()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"unscale": 0.25},
        {"clip": torch.tensor(0.5), "non_finite": torch.tensor(0.0)},
        {"unscale": 0.25, "clip": torch.tensor([0.5]), "non_finite": torch.tensor([0.0])},
        {"clip": torch.tensor(0.5), "non_finite": torch.tensor(1.0)},
    ],
)
def test_updates_are_the_definitions(dtype: torch.dtype, words: dict[str, Any]) -> None:
    """Also the copies in bf16, to a rounding of theirs; where a step is skipped nothing is written."""
    ours, theirs = steps(by_apex, dtype=dtype, **words), steps(lambda: dispatch.preferring(), dtype=dtype, **words)
    for ours_of_kind, theirs_of_kind in zip(ours[:3], theirs[:3], strict=True):
        for a, b in zip(ours_of_kind, theirs_of_kind, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    for a, b in zip(ours[3], theirs[3], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
    if float(words.get("non_finite", 0)):
        assert torch.equal(ours[0][0], drawn((7, 3))[0])
        assert not ours[3][0].any()


def test_an_update_is_that_of_torchs_own_optimizer() -> None:
    leaves = [leaf.requires_grad_() for leaf in drawn((7, 3), (11,))]
    optimizer = torch.optim.AdamW(leaves, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 4):
        for leaf, grad in zip(leaves, drawn((7, 3), (11,), (0,), seed=step), strict=False):
            leaf.grad = grad
        optimizer.step()
    for a, b in zip(steps(by_apex)[0], leaves, strict=False):
        torch.testing.assert_close(a, b.detach(), rtol=2e-6, atol=1e-7)


def test_what_apex_cannot_update_the_definition_does() -> None:
    params, grads = drawn((6, 4)), drawn((6, 4), seed=1)
    states = [torch.zeros(4, 6).t() for _ in range(2)]  # not contiguous
    expected = [x.clone() for x in (params[0], *states)]
    adamw_reference.adamw(*([x] for x in (expected[0], grads[0], *expected[1:])), step=1, **SETTINGS)  # type: ignore[arg-type]
    with standing_in("apex"), dispatch.preferring(optimizer="apex"):
        adamw(params, grads, *([state] for state in states), step=1, **SETTINGS)
        reasons = [implementation.reason for _, implementation in dispatch._announced]
        assert any(reason.startswith("kernels take contiguous float32 parameters and states") for reason in reasons)
    assert torch.equal(params[0], expected[0])


def test_double_numbers_and_a_cpu_are_no_tensors_for_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (part.double() for part in drawn((4, 8), (8,)))
    with standing_in("apex"), dispatch.preferring(norm="apex"):
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
        assert said("rms_norm") == "reference"
        monkeypatch.setattr(apex, "on_gpu", lambda tensor: False)
        assert apex.choice("norm", (x.float(),)) is not apex.RUNS["norm"]


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ((), "NVIDIA apex is not installed here (the package `apex` on PyPI is another program)"),
        (("other_apex",), "is not NVIDIA's but the package of that name on PyPI, another program"),
        (("apex",), ""),
    ],
)
def test_the_other_apex_is_told_apart_and_never_run(installed: tuple[str, ...], reason: str) -> None:
    with standing_in(*installed):
        for kind in ("norm", "optimizer"):
            assert reason in apex.why_not(kind)
            assert bool(apex.why_not(kind)) == bool(reason)


def test_apex_without_its_extensions_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").symlink_to(FOLDER / "apex/apex")
    with standing_in():
        monkeypatch.syspath_prepend(str(tmp_path))
        assert apex.why_not("optimizer") == (
            "NVIDIA apex is here, but its amp_C cannot be used (No module named 'amp_C'); build it with its CUDA "
            "extensions"
        )


def test_what_runs_is_explained_as_the_recipe_has_it() -> None:
    def line(op: str) -> str:
        return next(line for line in dispatch.explain().splitlines() if line.startswith(f"{op}:"))

    with standing_in("apex"), dispatch.preferring(norm="apex", optimizer="torch"):
        assert line("rms_norm") == "rms_norm: NVIDIA apex (ops.norm=apex)"
        assert line("adamw") == "adamw: reference (the recipe asks for torch's own)"
        with dispatch.use("reference"):
            assert line("rms_norm") == "rms_norm: reference (CUDA_EXT=reference)"
            assert dispatch.why_not("norm", "apex", (9, 0)) == "CUDA_EXT=reference leaves no choice"
    with standing_in(), dispatch.preferring(norm="apex"):
        assert "NVIDIA apex is not installed here" in line("rms_norm")
