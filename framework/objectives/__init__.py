"""F2: what training minimises, as pure mathematics: tensors in, tensors out; no config, no rank, no `.item()`.

The public functions answer here by name and load torch when first touched: `framework.objectives.gae(...)`.
A loss returns (loss, metrics): the loss is a sum over what counts here divided by the global count it is given, so that
the losses of all parts of a batch add up to the loss of the batch (law Tokens); metrics are {name: (sum, weight)},
additive over micro-batches and ranks, detached, and mean sum / weight.
"""

import importlib
from typing import Any

_PLACE = {
    "next_token_loss": "language",
    "pairwise_ranking_loss": "preference",
    "dpo_loss": "preference",
    "classification_loss": "classification",
    "regression_loss": "classification",
    "gae": "advantage",
    "whiten": "advantage",
    "group_advantages": "advantage",
    "policy_loss": "ppo",
    "value_loss": "ppo",
    "explained_variance": "ppo",
    "estimate_kl": "kl",
    "token_rewards": "kl",
    "adapt_coefficient": "kl",
    "entropy_loss": "regulariser",
}
__all__ = sorted(_PLACE)


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACE[name]}"), name)
