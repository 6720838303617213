"""The reward model as a judge: one score a response. Penalties for responses that never stopped are the loop's."""

import json
from pathlib import Path

from torch import Tensor

from framework.cluster.marks import split_rows
from framework.core.errors import UsageError
from framework.core.records import Rollout
from framework.core.runtime import Runtime
from framework.models.adapters import is_adapter
from framework.models.hub import locate
from framework.workers.config import EngineSpec
from framework.workers.trainer import Trainer


class Reward(Trainer):
    """Scores by the class head on the last real token; mean 0 and deviation 1 where the model's folder says how."""

    part = "reward"
    num_classes = 1

    def __init__(self, runtime: Runtime, spec: EngineSpec):
        super().__init__(runtime, spec)
        self.mean, self.deviation = normalisation(locate(spec.folder))

    @split_rows
    def score(self, rollout: Rollout) -> Tensor:
        """[B]: of prompt and response together, at the last token that is not padding."""
        scores = self.engine.infer(rollout)
        assert scores.classes is not None
        return (scores.classes.squeeze(-1) - self.mean) / self.deviation


def normalisation(folder: Path) -> tuple[float, float]:
    """(mean, deviation) of the raw scores on reference responses, from the folder's config.json: keys score_mean and
    score_std (Stiennon et al. 2020 normalise so after training); 0 and 1 where it has none."""
    if is_adapter(folder):
        raise UsageError(
            f"reward_from={folder} is an adapter, which does not say how its scores are normalised; take the model/ "
            "beside it, which has it merged in"
        )
    stored = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    mean, deviation = float(stored.get("score_mean", 0.0)), float(stored.get("score_std", 1.0))
    if deviation <= 0:
        raise UsageError(f"{folder}/config.json: score_std={deviation:g} must be positive")
    return mean, deviation
