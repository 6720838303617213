"""AdamW over named tensors. It knows no rank and no mesh: whoever shards hands in its own part of each tensor.

An element's new bits depend on that element alone (`cuda_ext.adamw`), so the result is the same under every sharding.
Left out: the learning rate, which comes with every step, and clipping, which needs the norm over all ranks.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cuda_ext.adamw.op import adamw
from framework.optim.build import is_decayed
from framework.optim.config import OptimConfig

KINDS = ("exp_avg", "exp_avg_sq")
_BUCKET = 1 << 24  # elements updated at once: what the update holds besides its states stays small


class AdamW:
    """`parameters`: logical name -> tensor, updated in place. `names` of decayed ones are settled by `is_decayed`."""

    def __init__(self, parameters: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], config: OptimConfig):
        """`shapes` are those of the whole tensors: a shard of a matrix is decayed as the matrix is."""
        self.config = config
        self.updates = 0  # steps that changed something; the bias correction counts these
        self._parameters = dict(parameters)
        self._states = {kind: {n: torch.zeros_like(p) for n, p in self._parameters.items()} for kind in KINDS}
        decayed = [name for name in self._parameters if is_decayed(name, shapes[name])]
        others = [name for name in self._parameters if not is_decayed(name, shapes[name])]
        self._buckets = [
            (names, decay)
            for group, decay in ((decayed, config.weight_decay), (others, 0.0))
            for names in _split(group, self._parameters)
        ]

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float) -> None:
        """One update by `gradients`, one for every parameter."""
        self.updates += 1
        config = self.config
        for names, decay in self._buckets:
            adamw(
                [self._parameters[name] for name in names],
                [gradients[name] for name in names],
                *([self._states[kind][name] for name in names] for kind in KINDS),
                step=self.updates,
                lr=lr,
                beta1=config.beta1,
                beta2=config.beta2,
                eps=config.eps,
                weight_decay=decay,
            )

    def states(self) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, parameter name, live tensor)."""
        for kind in KINDS:
            for name, state in self._states[kind].items():
                yield kind, name, state

    def reset(self) -> None:
        """Forget all moments, as after loading other weights."""
        self.updates = 0
        for _, _, state in self.states():
            state.zero_()


def _split(names: list[str], tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """`names` in order, cut where a bucket is full; empty shards are left out."""
    bucket: list[str] = []
    size = 0
    for name in names:
        count = tensors[name].numel()
        if bucket and size + count > _BUCKET:
            yield bucket
            bucket, size = [], 0
        if count:
            bucket.append(name)
            size += count
    if bucket:
        yield bucket
