"""What a generator is: weights of its own, prompts in, rollouts out."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from framework.core.records import PromptBatch, Rollout
from framework.generation.config import SamplingConfig


class Generator(Protocol):
    """Collective where it has several ranks; every token carries the version of the policy that drew it."""

    reads_apart: bool  # an encoder reads the prompts; a row is then the decoder's: its start token and the response

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take (logical name, full tensor) of a policy and its version; may be called with a part at a time."""

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingConfig,
        samples: int = 1,
        seed: int = 0,
        width: int | None = None,
    ) -> Rollout:
        """`samples` responses a prompt, rows in the order prompt 0 sample 0, prompt 0 sample 1, ...

        A sampled token is a pure function of (seed, prompts.row, sample, position, logits): law Sampling. Rows are
        padded on the right to `width` tokens, for a trainer whose shapes are constant; without it, as is convenient."""

    def fingerprints(self) -> dict[str, int]:
        """The sharding-independent hash of every live tensor, by logical name: law Sync."""
