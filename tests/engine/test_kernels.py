"""The engine on kernels, by the emulator: its losses, gradients and updates are those of the references, and a
pointwise loss goes through the vocabulary once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cuda_ext import dispatch, library
from cuda_ext.linear_log_probs import op, token_loss
from framework.core.records import Experience, Rows, align
from framework.core.runtime import Runtime
from framework.engine.metrics import means
from framework.parallel.config import ParallelConfig
from framework.stages.pretrain import token_loss as language
from framework.workers.actor import PolicyLoss, TokenPolicyLoss
from framework.workers.config import PpoConfig
from tests.distributed import run_ranks
from tests.engine.cases import FSDP, SINGLE, UNTIED, build, deviation, packed, rollout, weights
from tests.engine.lattice import share

POLICY = PpoConfig(entropy_coefficient=0.01)
TENSOR, ZERO3 = ParallelConfig("tp", tensor=0), ParallelConfig("zero3", zero=3)


def experience(count: int, old: Callable[[Rows], Tensor]) -> Experience:
    drawn = rollout(count)
    mask, random = drawn.response_mask, torch.Generator().manual_seed(0)
    before, noise = align(old(drawn)), torch.randn(mask.shape, generator=random) * mask
    return Experience(drawn, before, before, noise, noise, noise, noise)


def uniform(rows: Rows) -> Tensor:
    return torch.full(rows.inputs().tokens.shape, -3.6)


def update(runtime: Runtime, parallel: ParallelConfig, mode: str, policy: bool) -> tuple[dict[str, Tensor], ...]:
    """(weights after two steps, the last loss and gradient norm) in fp32."""
    with dispatch.use(mode):
        engine = build(runtime, parallel, model=UNTIED, temperature=0.7)
        rows = share(experience(5, uniform) if policy else packed(5), engine)
        for _ in range(2):
            metrics = means(engine.forward_backward(rows, TokenPolicyLoss(POLICY) if policy else language))
            report = engine.step()
        figures = torch.tensor([metrics["policy_loss" if policy else "loss"], report.grad_norm])
        return weights(engine), {"loss and norm": figures}


@pytest.mark.parametrize("policy", [False, True], ids=["pretraining", "policy"])
@pytest.mark.parametrize("parallel", [SINGLE, FSDP, TENSOR, ZERO3], ids=lambda parallel: parallel.name)
def test_emulated_a_step_is_that_of_the_references(parallel: ParallelConfig, policy: bool) -> None:
    library.emulator()
    ranks = 1 if parallel == SINGLE else 2
    kernels = run_ranks(update, ranks, parallel, "emulator", policy)
    for ours, theirs in zip(kernels[0], update(Runtime(), SINGLE, "reference", policy), strict=True):
        assert deviation(ours, theirs) < 2e-5


@pytest.mark.parametrize("loss", [TokenPolicyLoss, PolicyLoss])
@pytest.mark.parametrize("parallel", [SINGLE, TENSOR], ids=["single", "tp"])
def test_emulated_the_first_ratio_is_one(parallel: ParallelConfig, loss: type[PolicyLoss]) -> None:
    """Bit for bit: log-probs inferred and those of the update are one function, other rows or not."""
    library.emulator()
    for deviations in run_ranks(first_deviation, 1 if parallel == SINGLE else 2, parallel, loss):
        assert deviations == [0.0, 0.0]


def first_deviation(runtime: Runtime, parallel: ParallelConfig, loss: type[PolicyLoss]) -> list[float]:
    with dispatch.use("emulator"):
        engine = build(runtime, parallel, model=UNTIED, micro_size=3)
        rows = experience(5, lambda drawn: engine.infer(drawn).log_probs)
        other = rows.select(torch.tensor([4, 1]))
        return [means(engine.forward_backward(part, loss(POLICY)))["ratio_deviation"] for part in (rows, other)]


def test_emulated_a_pointwise_loss_goes_through_the_vocabulary_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[int] = []

    def counted(hidden: Tensor, weight: Tensor, chunk: int) -> object:
        gone.append(len(hidden))
        return op.chunks(hidden, weight, chunk)

    monkeypatch.setattr(token_loss, "chunks", counted)
    monkeypatch.setattr(op, "fused_backward", None)
    rows = packed(4)
    with dispatch.use("emulator"):
        build(micro_size=2).forward_backward(rows, language)
    assert len(gone) == 2
    assert sum(gone) == int(rows.loss_mask.sum())
