"""The critic: a model with a value head that learns what a response will be worth from each token on."""

from torch import Tensor

from framework.cluster.marks import split_reduced, split_rows
from framework.core.masked import counting
from framework.core.records import Counts, Experience, Metrics, Rollout, Rows, Scores, align
from framework.core.runtime import Runtime
from framework.engine.metrics import means
from framework.objectives.ppo import explained_variance, value_loss
from framework.workers.config import EngineSpec, PpoConfig
from framework.workers.trainer import Trainer


class Critic(Trainer):
    """Starts from a reward model (its score is the first value) or from a language model (first values are zero)."""

    part = "critic"
    value_head = True

    def __init__(self, runtime: Runtime, spec: EngineSpec, ppo: PpoConfig):
        super().__init__(runtime, spec)
        self.loss = ValueLoss(ppo.value_clip)

    @split_rows
    def values(self, rollout: Rollout) -> Tensor:
        """[B, T]: V(tokens[b, :t]) of each response token, zero elsewhere."""
        scores = self.engine.infer(rollout)
        assert scores.values is not None
        return counting(align(scores.values), rollout.response_mask)

    @split_reduced
    def update(self, minibatch: Experience) -> dict[str, float]:
        """One optimizer step on one minibatch; figures named critic/..."""
        figures = means(self.engine.forward_backward(minibatch, self.loss))
        report = self.engine.step()
        figures["explained_variance"] = explained_variance(
            figures["return"],
            figures.pop("return_square"),
            figures.pop("return_error"),
            figures.pop("return_error_square"),
        )
        figures |= {"grad_norm": report.grad_norm, "lr": report.lr, "skipped": float(report.skipped)}
        return {f"critic/{name}": figure for name, figure in figures.items()}


class ValueLoss:
    """The clipped value loss in the shape that the engine calls."""

    def __init__(self, clip: float):
        self.clip = clip

    def __call__(self, scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        """Mean over all response tokens of the step."""
        assert isinstance(rows, Experience)
        assert scores.values is not None
        weights = rows.rollout.response_mask.to(scores.values.dtype)
        return value_loss(align(scores.values), rows.values, rows.returns, weights, counts.tokens, self.clip)
