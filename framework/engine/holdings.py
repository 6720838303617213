"""What one rank holds of the model: its part of each parameter, where that stands, and how the whole is had.

Everything here goes by logical name, whatever the layout. Left out: optimizer states (the engine), and files
(`checkpoint`), which know boxes but no ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.checkpoint.integrity import signed, tensor_hash
from framework.core.config import digest
from framework.core.deadline import deadline
from framework.core.records import Box, ReadBox, whole
from framework.models.lora import LoraLinear
from framework.models.quantised import Quantised
from framework.models.scorer import Scorer, logical_name
from framework.parallel.config import AXES
from framework.parallel.mesh import Mesh
from framework.parallel.shard import Part, full, local

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Stage:
    """One part of the model on this rank: all of it, or a pipeline stage. `parts` are by module name, and `aliases`
    say which of these go by another logical name: {"model.head.weight": "embedding.weight"}."""

    number: int
    scorer: Scorer
    parts: Mapping[str, Part]
    aliases: Mapping[str, str]

    def named(self) -> Iterator[tuple[str, nn.Parameter, Part]]:
        """(logical name, parameter, where it stands)."""
        for name, parameter in self.scorer.named_parameters():
            yield self.aliases.get(name, logical_name(name)), parameter, self.parts[name]

    def quantised(self) -> Iterator[tuple[str, Quantised]]:
        """(logical name of the weight, what stands in its place)."""
        for name, part in self.scorer.named_modules():
            if isinstance(part, LoraLinear) and part.quantised is not None:
                yield f"{logical_name(name)}.weight", part.quantised


class Holdings:
    """`parameters` are this rank's, by logical name, and for the part of those `owned` it speaks; those in `learning`
    get gradients; `shapes` are those of all whole parameters, in the model's order."""

    def __init__(self, stages: Sequence[Stage], shapes: Mapping[str, tuple[int, ...]], mesh: Mesh):
        held = [entry for stage in stages for entry in stage.named()]
        self.shapes = dict(shapes)
        self.parameters = {name: parameter for name, parameter, _ in held}
        self.learning = {name for name, parameter in self.parameters.items() if parameter.requires_grad}
        self._quantised = {name: matrix for stage in stages for name, matrix in stage.quantised()}
        self._parts = {name: part for name, _, part in held}
        self._boxes = {name: part.box_of(parameter) for name, parameter, part in held}
        self.owned = [name for name, parameter, part in held if part.is_owner(parameter)]
        self._everyone = mesh.ranks(*AXES)
        self._sums = {"tensor": mesh.ranks("tensor"), "pipeline": mesh.pipeline_ends()}
        self._cut = any(mesh.size(axis) > 1 for axis in ("tensor", "pipeline"))

    def locals(self) -> dict[str, Tensor]:
        """This rank's part of each parameter, sharing memory."""
        return {name: local(parameter) for name, parameter in self.parameters.items()}

    def box(self, name: str) -> Box:
        """Where this rank's part stands in the whole."""
        return self._boxes[name]

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of the gradient of each parameter that learns; zero where no loss has reached. Collective:
        some parameters meet a share of the places alone, or stand at both ends of a pipeline, and their gradients are
        added up here."""
        found = {name: _gradient(x) for name, x in self.parameters.items() if name in self.learning}
        for axis, ranks in self._sums.items():
            names = [name for name, part in self._parts.items() if part.summed_over == axis and name in found]
            if names and ranks.group is not None:
                total = ranks.sum(torch.cat([found[name].flatten() for name in names]), "shared gradients")
                parts = total.split([found[name].numel() for name in names])
                found |= {name: part.view_as(found[name]) for name, part in zip(names, parts)}
        return found

    def whole(self, name: str, mine: Tensor | None) -> Tensor:
        """The tensor that `mine`, shaped as this rank's part of parameter `name`, is part of; None where it holds none.
        The bits of every part arrive unchanged: they are added up as integers. Collective."""
        if self._everyone.group is None and mine is not None:
            return mine
        some = next(iter(self.parameters.values()))
        total = torch.zeros(self.shapes[name], dtype=some.dtype, device=some.device)
        if mine is not None and name in self.owned:
            total[tuple(slice(offset, offset + length) for offset, length in self.box(name))] = mine
        return self._everyone.sum(total.view(_BITS[total.dtype]), f"the parts of {name}").view(total.dtype)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, full tensor) of every parameter, one at a time. Collective."""
        for name in self.shapes:
            if name in self._quantised:
                yield name, self._quantised[name].weight(next(iter(self.parameters.values())).dtype)
            elif self._cut:
                parameter = self.parameters.get(name)
                yield name, self.whole(name, None if parameter is None else local(parameter))
            else:
                with deadline(f"the gathering of {name}"):
                    weight = full(self.parameters[name])
                yield name, weight

    def fingerprints(self) -> dict[str, int]:
        """The hash of this rank's part of every parameter; over ranks they add up modulo 2**64."""
        return {n: tensor_hash(local(self.parameters[n]), self.box(n), self.shapes[n]) for n in self.owned}

    def digest(self) -> str:
        """16 hex digits that name the bits of all parameters, however they are laid out. Collective."""
        mine = self.fingerprints()
        hashes = torch.tensor([signed(mine.get(name, 0)) for name in self.shapes])
        some = next(iter(self.parameters.values()))
        total = self._everyone.sum(hashes.to(some.device), "the weights' hashes")
        return digest(dict(zip(self.shapes, total.tolist(), strict=True)))

    def fill(self, read: ReadBox, quantised: bool = True) -> None:
        """Take this rank's part of every parameter from `read`, and with `quantised` all of each matrix in 4 bits,
        which no checkpoint holds."""
        for name, matrix in self._quantised.items() if quantised else ():
            matrix.take(read(name, whole(matrix.shape)).to(next(iter(self.parameters.values())).device))
        for name, part in self.locals().items():
            if part.numel():
                part.copy_(read(name, self.box(name)))

    def sum(self, x: Tensor, what: str) -> Tensor:
        """Over every rank of the world."""
        return self._everyone.sum(x, what)

    @property
    def is_first(self) -> bool:
        return self._everyone.rank == 0


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)
