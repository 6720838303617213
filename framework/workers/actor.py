"""The actor: the policy that learns. It answers log-probs, takes PPO steps, and hands out its weights."""

from collections.abc import Iterator

import torch
from torch import Tensor

import framework.objectives.ppo  # noqa: F401  (enters its policy losses into the registry)
from framework.cluster.marks import every, split_reduced, split_rows, stream
from framework.core.errors import FrameworkError
from framework.core.masked import masked_sum, ratio
from framework.core.records import Counts, Experience, Metrics, Rollout, Rows, Scores, align
from framework.core.registry import lookup
from framework.core.runtime import Runtime
from framework.engine.metrics import means
from framework.workers.config import EngineSpec, PpoConfig
from framework.workers.trainer import Trainer

BUCKET_BYTES = 64 << 20  # of weights handed out at a time
# The most that the first update's mean |ratio - 1| may be where kernels may depend on the shape of a batch; strict
# engines must be exact. A wrong temperature, mask or model is far beyond it.
LOOSE_RATIO = 1e-2

Bucket = list[tuple[str, Tensor]]


class Actor(Trainer):
    """See the module. Tensors of answers stand at token positions, on the CPU."""

    part = "actor"

    def __init__(self, runtime: Runtime, spec: EngineSpec, ppo: PpoConfig):
        super().__init__(runtime, spec)
        self.loss = policy_loss_of(ppo)
        self.version = -1  # of the policy that generators are proven to hold
        self._unchanged = False  # since the last log_probs

    @split_rows
    def log_probs(self, rollout: Rollout) -> Tensor:
        """[B, T]: log-prob of each response token at the rollout temperature, zero elsewhere: PPO's old_log_probs,
        computed in the row shapes of the update."""
        self._unchanged = True
        return align(self.engine.infer(rollout).log_probs)

    @split_reduced
    def update(self, minibatch: Experience) -> dict[str, float]:
        """One optimizer step on one minibatch; figures named actor/..."""
        self._refuse_stale(minibatch.rollout)
        figures = means(self.engine.forward_backward(minibatch, self.loss))
        if self._unchanged:
            self._check_first_ratio(figures["ratio_deviation"])
        report = self.engine.step()
        self._unchanged = self._unchanged and report.skipped
        figures |= {"grad_norm": report.grad_norm, "lr": report.lr, "skipped": float(report.skipped)}
        return {f"actor/{name}": figure for name, figure in figures.items()}

    @stream
    def weights(self) -> Iterator[Bucket]:
        """All weights as buckets of (logical name, full tensor)."""
        bucket: Bucket = []
        for name, tensor in self.engine.weights():
            bucket.append((name, tensor.detach()))
            if sum(held.nbytes for _, held in bucket) >= BUCKET_BYTES:
                yield bucket
                bucket = []
        if bucket:
            yield bucket

    @every
    def published(self, version: int) -> None:
        """Take note that the generator has proven to hold these weights under `version`."""
        self.version = version

    def _refuse_stale(self, rollout: Rollout) -> None:
        """Law Sync: every response token must come from the weights that were last published and proven."""
        drawn = rollout.policy_version[rollout.response_mask]
        if (drawn != self.version).any():
            versions = ", ".join(str(v) for v in drawn.unique().tolist())
            raise FrameworkError(
                f"the rollout was drawn by policy version {versions}, the one last published and proven is "
                f"{self.version}; publish before generating, and update on that rollout alone"
            )

    def _check_first_ratio(self, deviation: float) -> None:
        """Law On-policy: nothing has changed since old_log_probs were computed, so pi / pi_old must be 1."""
        allowed = 0.0 if self.spec.engine.strict else LOOSE_RATIO
        if deviation > allowed:
            raise FrameworkError(
                f"the first update's mean |ratio - 1| is {deviation:.3g}, at most {allowed:g} is right: old_log_probs "
                "are not those of this policy on these rows and at this temperature"
            )


class PolicyLoss:
    """The registered policy loss, less the entropy bonus, of whole rows."""

    needs_entropy = True

    def __init__(self, ppo: PpoConfig):
        self.ppo = ppo
        self.function = lookup("policy_loss", ppo.policy_loss)

    def __call__(self, scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        """Means over all response tokens of the step."""
        assert isinstance(rows, Experience)
        assert scores.entropy is not None
        return self._of(align(scores.log_probs), align(scores.entropy), rows, rows.rollout.response_mask, counts)

    def _of(
        self, log_probs: Tensor, entropy: Tensor, rows: Experience, mask: Tensor, counts: Counts
    ) -> tuple[Tensor, Metrics]:
        """All of one shape, where `mask` is True they count."""
        loss, metrics = self.function(
            log_probs,
            rows.old_log_probs,
            rows.advantages,
            mask.to(log_probs.dtype),
            counts.tokens,
            self.ppo.clip_low,
            self.ppo.clip_high,
            entropy=entropy,
            reference_log_probs=rows.reference_log_probs,
        )
        total = masked_sum(entropy, mask)
        loss = loss - self.ppo.entropy_coefficient * ratio(total, counts.tokens)
        return loss, metrics | {"entropy": (total.detach(), mask.sum().to(torch.float64))}


class TokenPolicyLoss(PolicyLoss):
    """The same where the registered loss is a sum over tokens, each by itself: of response tokens alone, [M]."""

    pointwise = True

    def __call__(  # type: ignore[override]
        self, log_probs: Tensor, entropy: Tensor, rows: Experience, counts: Counts
    ) -> tuple[Tensor, Metrics]:
        """Means over all response tokens of the step, of which these are some."""
        return self._of(log_probs, entropy, rows, torch.ones_like(log_probs, dtype=torch.bool), counts)


def policy_loss_of(ppo: PpoConfig) -> PolicyLoss:
    """By what the registered loss says of itself: `pointwise = True`, or nothing."""
    function = lookup("policy_loss", ppo.policy_loss)
    return TokenPolicyLoss(ppo) if getattr(function, "pointwise", False) else PolicyLoss(ppo)
