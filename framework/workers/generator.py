"""The generator worker: weights of its own, received from the actor; prompts in, rollouts out."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from framework.cluster.marks import every, same, split_rows
from framework.core.records import PromptBatch, Rollout
from framework.core.runtime import Runtime
from framework.core.signals import current
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.native import NativeGenerator
from framework.models.config import LoraConfig
from framework.models.hub import read_folder


class Generator:
    """One native generator a rank, each answering its share of the prompts. `folder` gives the architecture alone. With
    `lora` it holds what the actor does, adapter and base apart, and so computes the same bits."""

    def __init__(
        self,
        runtime: Runtime,
        folder: str,
        sampling: SamplingConfig,
        generation: GenerationConfig,
        stop_ids: Sequence[int],
        width: int,
        lora: LoraConfig | None = None,
    ):
        self.data_rank, self.data_size = runtime.rank, runtime.world_size
        self.sampling = sampling
        self.width = width
        pause = partial(current().leave, "while generating")
        self.native = NativeGenerator(read_folder(folder)[0], generation, stop_ids, runtime.device, pause, lora)

    @same
    def load(self, bucket: list[tuple[str, Tensor]], version: int) -> None:
        """Take a part of the weights of policy `version`."""
        self.native.load(bucket, version)

    @split_rows
    def generate(self, prompts: PromptBatch, samples: int, seed: int) -> Rollout:
        """`samples` responses a prompt, in rows of the one width that all roles work in."""
        return self.native.generate(prompts, self.sampling, samples, seed, width=self.width)

    @every
    def fingerprints(self) -> dict[str, int]:
        """The hash of every live tensor, by logical name."""
        return self.native.fingerprints()
