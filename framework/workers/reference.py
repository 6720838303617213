"""The reference: the policy as it was before PPO, which the KL penalty measures against. It never changes."""

from torch import Tensor

from framework.cluster.marks import split_rows
from framework.core.records import Rollout, align
from framework.workers.trainer import Trainer


class Reference(Trainer):
    """See the module; its spec has no optimizer."""

    part = "reference"

    @split_rows
    def log_probs(self, rollout: Rollout) -> Tensor:
        """[B, T]: log-prob of each response token at the rollout temperature, zero elsewhere."""
        return align(self.engine.infer(rollout).log_probs)
