"""Our AdamW as a torch.optim.Optimizer, for a library that cuts parameters into flat stretches and calls `step`.

The numbers are `cuda_ext.adamw`'s, element by element, so an update has the same bits as `adamw.AdamW`'s. Left out:
when to update and how fast (`prepare`), clipping, and names: who knows what stands where in a stretch asks `state_of`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cuda_ext.adamw.op import adamw
from framework.optim.adamw import KINDS
from framework.optim.config import OptimConfig

_AT_ONCE = 1 << 24  # elements updated at once: what the update holds besides its states stays small


class FlatAdamW(torch.optim.Optimizer):
    """Every group is decayed by its own `weight_decay`. The library may call `step` several times for one update."""

    def __init__(self, groups: Iterable[dict[str, Any]], config: OptimConfig):
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})
        self.config = config
        self._number, self._held = 0, False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # there is no loss to compute again
        """Update whatever stands in the groups now and has a gradient."""
        for group in self.param_groups:
            for stretch in group["params"]:
                if stretch.grad is not None and not self._held:
                    self._update(stretch, group["lr"], group["weight_decay"])

    def prepare(self, number: int, lr: float, held: bool) -> None:
        """What comes next is update `number`, from 1, at the rate `lr`; with `held`, it changes nothing."""
        self._number, self._held = number, held
        for group in self.param_groups:
            group["lr"] = lr

    def state_of(self, stretch: Tensor) -> dict[str, Tensor]:
        """Its moments by `KINDS`, of its shape, live; zero before the first update."""
        state = self.state[stretch]
        if not state:
            state |= {kind: torch.zeros_like(stretch, requires_grad=False) for kind in KINDS}
        return state

    def _update(self, stretch: Tensor, lr: float, weight_decay: float) -> None:
        assert stretch.grad is not None
        state = self.state_of(stretch)
        for part in _parts(stretch, stretch.grad, *(state[kind] for kind in KINDS)):
            adamw(
                *([tensor] for tensor in part),
                step=self._number,
                lr=lr,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                weight_decay=weight_decay,
            )


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.detach().split(_AT_ONCE) for tensor in tensors), strict=True)
