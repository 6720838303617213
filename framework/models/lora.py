"""Low-rank adapters (Hu et al. 2021): beside a frozen matrix W [O,I] a product B A of rank r learns.

The layer gives x W^T + scale (x A^T) B^T with scale = alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023). A is drawn
and B is zero, so that a model with a fresh adapter is the model. Of a model with experts attention alone is adapted.

With DoRA (Liu et al. 2024, equation 5) the matrix is m (W + scale B A) / ||W + scale B A||, by rows: lengths m [O]
learn, at first those of W, and the norm counts as a constant in the gradient (section 4.3).
Left out: embeddings (they may learn in full, `also`), and how others write an adapter down (`adapters`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.core.config import require
from framework.core.records import Box, ReadBox
from framework.models.config import LoraConfig, ModelConfig
from framework.models.dropout import Dropout, Moment
from framework.models.frozen import matched
from framework.models.init import draw, parameter_shapes
from framework.models.layers import Linear, strict_linear
from framework.models.quantised import Quantised, library
from framework.models.transformer import Transformer

Shapes = dict[str, tuple[int, ...]]
_A, _B, _M = "lora_a", "lora_b", "lora_m"


class LoraLinear(Linear):
    """A Linear with an adapter. Its parameters: weight, bias, lora_a[r,I], lora_b[O,r], with DoRA lora_m[O]."""

    lora_m: nn.Parameter | None

    def __init__(self, base: Linear, rank: int, scale: float, dropout: Dropout | None = None, dora: bool = False):
        outputs, inputs = base.weight.shape
        with torch.device("meta"):
            super().__init__(inputs, outputs, base.bias is not None, base.strict)
            self.lora_a = nn.Parameter(torch.empty(rank, inputs))
            self.lora_b = nn.Parameter(torch.empty(outputs, rank))
            self.register_parameter(_M, nn.Parameter(torch.empty(outputs)) if dora else None)
        self.scale, self.dropout = scale, dropout
        self.quantised: Quantised | None = None
        self.over_inputs: Callable[[Tensor], Tensor] = lambda squares: squares  # their sum over ranks that share inputs

    def product(self, x: Tensor) -> Tensor:
        """x[..., I] -> [..., O], without bias."""
        apply = strict_linear if self.strict else F.linear
        low = x if self.dropout is None else self.dropout(x)
        y = apply(x, self.weight, None) if self.quantised is None else self.quantised(x)
        y = y + self.scale * apply(apply(low, self.lora_a, None), self.lora_b, None)
        return y if self.lora_m is None else y * self._gain(self.lora_m)

    def _gain(self, lengths: Tensor) -> Tensor:
        """[O]: what makes the rows of W + scale B A as long as `lengths` says."""
        with torch.no_grad():
            squares = self.over_inputs(row_squares(self.weight, self.lora_a, self.lora_b, self.scale))
            norm = squares.sqrt().to(lengths.dtype)
        return lengths / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def forward(self, x: Tensor) -> Tensor:
        """x[..., I] -> [..., O]."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias


def attach(model: Transformer, lora: LoraConfig, seed: int = 0) -> None:
    """Give the matrices that `lora` names their adapters, in place. The model stands on the meta device. `seed`: of
    what dropout draws."""
    moment = Moment()
    for path in targets(model.config, lora):
        owner, _, leaf = path.rpartition(".")
        holder = model.get_submodule(owner)
        dropout = Dropout(lora.dropout, seed, path, moment) if lora.dropout else None
        setattr(holder, leaf, LoraLinear(getattr(holder, leaf), lora.rank, lora.scale, dropout, lora.dora))


def quantise(model: Transformer) -> None:
    """Let matrices with an adapter be held in 4 bits, in place of their weight, which must not have been filled yet."""
    library()  # refused now where it is not there
    for part in model.modules():
        if isinstance(part, LoraLinear):
            part.quantised = Quantised(part.weight.shape)
            part._parameters["weight"] = None


def targets(config: ModelConfig, lora: LoraConfig) -> list[str]:
    """Paths of the matrices with an adapter. UsageError where a target is none of the model's."""
    matrices = [
        name.removesuffix(".weight") for name, shape in parameter_shapes(config).items() if _is_inner(name, shape)
    ]
    if config.moe.experts:
        matrices = [path for path in matrices if ".attention." in path]
        _refuse_feed_forward(lora.targets)
    leaves = [path.rpartition(".")[2] for path in matrices]
    wanted = set(lora.targets) or set(leaves)
    for leaf in lora.targets:
        matched(leaf, leaves, "lora.targets")
    return [path for path, leaf in zip(matrices, leaves, strict=True) if leaf in wanted]


def _refuse_feed_forward(wanted: Iterable[str]) -> None:
    for leaf in wanted:
        require(
            leaf not in ("gate", "up", "down", "router", "shared_gate"),
            f"lora.targets: '{leaf}' is not adapted in a model with experts (model.moe.experts); choose q, k, v, o",
        )


def _is_inner(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("layers.") and len(shape) == 2


def lora_shapes(config: ModelConfig, lora: LoraConfig) -> Shapes:
    """Name -> shape of every parameter of the adapter."""
    whole = parameter_shapes(config)
    shapes: Shapes = {}
    for path in targets(config, lora):
        outputs, inputs = whole[f"{path}.weight"]
        shapes |= {f"{path}.{_A}": (lora.rank, inputs), f"{path}.{_B}": (outputs, lora.rank)}
        shapes |= {f"{path}.{_M}": (outputs,)} if lora.dora else {}
    return shapes


def still(config: ModelConfig, lora: LoraConfig) -> frozenset[str]:
    """The parameters of the model that do not learn beside an adapter: all but those in `also`."""
    names = list(parameter_shapes(config))
    learning = {name for pattern in lora.also for name in matched(pattern, names, "lora.also")}
    return frozenset(names) - learning


def with_fresh(read: ReadBox, config: ModelConfig, lora: LoraConfig, seed: int) -> ReadBox:
    """`read`, and a fresh adapter: A of Normal(0, 1 / (3 I)), the variance of PEFT's, by law Init; B zero; m the
    lengths of the rows of W."""
    shapes, whole = lora_shapes(config, lora), parameter_shapes(config)

    def drawn(name: str, box: Box) -> Tensor:
        if name not in shapes:
            return read(name, box)
        if name.endswith(_B):
            return torch.zeros([length for _, length in box])
        if name.endswith(_M):
            weight = f"{name.removesuffix(_M)}weight"
            return torch.linalg.vector_norm(read(weight, (*box, (0, whole[weight][1]))), dim=1, dtype=torch.float64)
        return draw(name, box, shapes[name], (3 * shapes[name][1]) ** -0.5, seed)

    return drawn


def merged(
    weights: Iterable[tuple[str, Tensor]], paths: Collection[str], lora: LoraConfig, kept: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model with adapters at `paths` -> those of the model that computes the same without. What the
    adapters hold is put into `kept`, by name."""
    waiting: dict[str, Tensor] = {}
    last = _M if lora.dora else _B
    for name, tensor in weights:
        path, _, leaf = name.rpartition(".")
        if leaf in (_A, _B, _M):
            kept[name] = tensor
            if leaf == last:
                a, b = kept[f"{path}.{_A}"], kept[f"{path}.{_B}"]
                yield f"{path}.weight", plus(waiting.pop(path), a, b, lora.scale, kept.get(f"{path}.{_M}"))
        elif leaf == "weight" and path in paths:
            waiting[path] = tensor
        else:
            yield name, tensor


def row_squares(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W + scale B A||^2 by rows, [O] in fp64, without that matrix: w^2 + 2 scale b (W A^T) + scale^2 b (A A^T) b."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
    weight, a, b = weight.to(wide), a.to(wide), b.to(wide)
    added = 2 * scale * (b * F.linear(weight, a)) + scale**2 * (b * F.linear(b, a @ a.T))
    return (own + added.sum(1, dtype=torch.float64)).clamp_min(0)


def plus(weight: Tensor, a: Tensor, b: Tensor, scale: float, lengths: Tensor | None = None) -> Tensor:
    """weight[O,I] + scale b[O,r] a[r,I], its rows as long as `lengths` [O] says where given; rounded once to weight's
    dtype. A box of it (of whole rows, with lengths) has the bits of the whole: products of fp32 numbers are exact in
    fp64, and are added up in one order."""
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for column, row in zip(b.double().unbind(1), a.double().unbind(0), strict=True):
        total.addcmul_(column.unsqueeze(1), row.unsqueeze(0))
    total = weight.double() + total.mul_(scale)
    if lengths is not None:
        norm = torch.linalg.vector_norm(total, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        total *= (lengths.double() / norm).unsqueeze(1)
    return total.to(weight.dtype)
