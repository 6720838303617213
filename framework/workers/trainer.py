"""What every role with an engine shares: how the engine is built from a folder, checkpointed, fingerprinted, exported.

Left out: what a role answers (`actor`, `critic`, `reference`, `reward`), and the training loop of the supervised
stages (`engine/loop`).
"""

from pathlib import Path

import torch
from torch import Tensor

from framework.checkpoint.format import PartReader, write_part
from framework.cluster.marks import every, same
from framework.core.records import Box, ReadBox
from framework.core.runtime import Runtime
from framework.engine.build import build_engine
from framework.engine.protocol import Engine
from framework.engine.sketch import Share, take
from framework.models.export import save_adapted
from framework.models.hub import read_folder, save_weights
from framework.models.lora import still, with_fresh
from framework.workers.config import EngineSpec


class Trainer:
    """One rank of a role that owns an engine. `part` is its name in a checkpoint.

    `value_head` makes a critic, from a reward model's folder (its score becomes the first value) or from a language
    model's (its first values are zero); `num_classes` a classifier.
    """

    part = "model"
    value_head = False
    num_classes = 0

    def __init__(self, runtime: Runtime, spec: EngineSpec):
        self.runtime = runtime
        self.spec = spec
        self.model, read, shapes = read_folder(spec.folder)
        weights, lora = read if "value_head.weight" in shapes else _with_zero_head(read), spec.lora
        self.engine: Engine = build_engine(
            self.model,
            runtime=runtime,
            parallel=spec.parallel,
            config=spec.engine,
            micro_size=spec.micro_size,
            optim=spec.optim,
            total_steps=spec.total_steps,
            weights=weights if lora is None else with_fresh(weights, self.model, lora, spec.seed),
            value_head=self.value_head,
            num_classes=self.num_classes,
            temperature=spec.temperature,
            frozen=frozenset() if lora is None else still(self.model, lora),
            lora=lora,
        )
        self.data_rank, self.data_size = self.engine.data_rank, self.engine.data_size

    @every
    def save_part(self, staging: str) -> None:
        """Write this rank's shards of weights and optimizer into the staging folder of a checkpoint."""
        write_part(Path(staging), self.part, self.runtime.rank, self.engine.shards(), self.runtime.world_size)

    @every
    def restore(self, checkpoint: str) -> None:
        """Take weights and optimizer from a checkpoint's folder, whatever layout wrote it."""
        self.engine.load_shards(PartReader(Path(checkpoint), self.part))

    @same
    def export(self, folder: str, extra: dict[str, int | None], adapter: str = "") -> str:
        """Write the weights as a Hugging Face folder, an adapter merged in; `extra` goes into config.json. `adapter`: a
        folder for the adapter alone; why it is not there, or "". The tokenizer is the stage's."""
        weights, classes = self.engine.weights(), 1 if self.value_head else self.num_classes
        if not self.runtime.is_main:
            for _ in weights:  # gathering is collective
                pass
        elif self.spec.lora is None:
            save_weights(self.model, weights, folder, classes=classes, extra=extra)
        else:
            alone, base = Path(adapter) if adapter else None, self.spec.folder
            return save_adapted(self.model, weights, self.spec.lora, Path(folder), alone, base, classes, extra)
        return ""

    @every
    def fingerprints(self) -> dict[str, int]:
        """The hash of this rank's part of every parameter, by logical name; over ranks they add up modulo 2**64."""
        return self.engine.fingerprints()

    @same
    def digest(self) -> str:
        """16 hex digits that name the bits of all parameters, however they are laid out."""
        return self.engine.digest()

    @every
    def shares(self) -> list[Share]:
        """What this rank says of its parts of the weights, for a trace."""
        return take(self.engine.pieces())


def _with_zero_head(read: ReadBox) -> ReadBox:
    """`read`, and a value head of zeros: values start at zero, not at noise (Ziegler et al. 2019)."""

    def with_head(name: str, box: Box) -> Tensor:
        return torch.zeros([length for _, length in box]) if name == "value_head.weight" else read(name, box)

    return with_head
