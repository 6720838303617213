"""The engine on DeepSpeed: ZeRO-1, -2 and -3 (Rajbhandari et al. 2020), and -3 with CPU offload. Data ranks only.

DeepSpeed gathers, reduces and shares out; the loss, the update and the checkpoint are ours, so that it gives the torch
engine's answer. Left out: what DeepSpeed is told (`deepspeed_settings`), and how it lays things out
(`deepspeed_stretches`).
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import astuple
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from framework.checkpoint.integrity import MODULUS, signed, tensor_hash
from framework.core.config import digest
from framework.core.deadline import deadline
from framework.core.errors import NonFiniteError
from framework.core.records import Box, Counts, Metrics, ReadBox, Rows, Scores
from framework.core.runtime import Runtime, ensure_group
from framework.engine.balancing import Balancing
from framework.engine.config import EngineConfig, NonFinite
from framework.engine.deepspeed_settings import settings
from framework.engine.deepspeed_stretches import Partitions, Shares, Stretch
from framework.engine.dropping import Dropping
from framework.engine.flops import Work, training_work
from framework.engine.micro_batches import without_empty
from framework.engine.passes import Passes, Straight
from framework.engine.precision import COMPUTE
from framework.engine.protocol import LossFn, Piece, StepReport
from framework.models.config import LoraConfig, ModelConfig
from framework.models.lora import attach
from framework.models.scorer import Scorer, logical_name
from framework.models.transformer import Transformer
from framework.optim.adamw import KINDS
from framework.optim.build import is_decayed
from framework.optim.config import OptimConfig
from framework.optim.flat_adamw import FlatAdamW
from framework.optim.schedule import learning_rate
from framework.parallel.collectives import DATA, Ranks
from framework.parallel.config import ParallelConfig, require_deepspeed
from framework.parallel.mesh import build_mesh
from framework.parallel.recompute import recompute

_COUNTERS: Box = ((0, 3),)  # optim/steps: steps taken, updates made, steps skipped in a row


def build_deepspeed_engine(
    model: ModelConfig,
    *,
    runtime: Runtime,
    parallel: ParallelConfig,
    config: EngineConfig,
    micro_size: int,
    optim: OptimConfig | None,
    total_steps: int,
    weights: ReadBox,
    value_head: bool = False,
    num_classes: int = 0,
    temperature: float = 1.0,
    frozen: frozenset[str] = frozenset(),
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> "DeepSpeedEngine":
    """As `build_engine`, `parallel.zero` set. Under ZeRO-3 no rank holds more than one module whole. Collective.

    `optim` None needs ZeRO-3: the other stages share out only what an optimizer has.
    """
    deepspeed = _import_deepspeed(runtime)
    mesh = build_mesh(parallel, runtime)
    with torch.device("meta"):
        scorer = Scorer(Transformer(model, config.strict), value_head, num_classes, temperature)
    if lora is not None:
        attach(scorer.model, lora, seed)
    scorer.to(COMPUTE[config.precision]).requires_grad_(optim is not None)
    for name, parameter in scorer.model.named_parameters():  # a classifier has no language head to freeze
        if name in frozen:
            parameter.requires_grad_(False)
    told = settings(
        parallel,
        config.precision,
        clip=optim.clip if optim else 0.0,
        elements=sum(p.numel() for p in scorer.parameters()),
        largest_vector=max((p.numel() for p in scorer.parameters() if p.dim() == 1), default=0),
        device=runtime.device,
    )
    for layer in scorer.model.layers.values():
        recompute(layer, parallel.recompute)
        if config.compile:
            layer.compile()
    _materialise(deepspeed, scorer, told, runtime)
    adamw = None if optim is None else FlatAdamW(_groups(scorer, optim), optim)
    leaves = _Leaves(scorer)
    with contextlib.redirect_stdout(io.StringIO()):  # in bf16, ZeRO-1 prints its memory a dozen times
        zero, *_ = deepspeed.initialize(model=leaves, optimizer=adamw, config=told, dist_init_required=False)
    ranks, device = mesh.ranks(*DATA), runtime.device
    engine = DeepSpeedEngine(leaves, zero, adamw, ranks, config, micro_size, total_steps, device, frozen)
    engine.load_weights(weights)
    return engine


class DeepSpeedEngine:
    """See `protocol.Engine`; `build_deepspeed_engine` makes one."""

    def __init__(
        self,
        leaves: "_Leaves",
        zero: Any,
        adamw: FlatAdamW | None,
        ranks: Ranks,
        config: EngineConfig,
        micro_size: int,
        total_steps: int,
        device: torch.device,
        frozen: frozenset[str],
    ):
        self.scorer, self.config, self.device, self.total_steps = leaves.scorer, config, device, total_steps
        self.ranks, self.data_rank, self.data_size = ranks, ranks.rank, ranks.size
        self.step_count = self._updates = self._skipped_in_a_row = 0
        self._zero, self._adamw, self._work, self._frozen = zero, adamw, Work(), frozen
        carrier = Straight(leaves.whole_again(zero), backward=self._backward)
        balance = None
        if self.scorer.model.config.moe.balance:  # it pulls during backward, and DeepSpeed averages that like the loss
            balance = Balancing([self.scorer.model], Ranks(None), device, times=self.data_size)
        dropping = Dropping.of([self.scorer], micro_size, device)
        self._passes = Passes(carrier, ranks, micro_size, device, balance, dropping)
        parameters = {logical_name(name): p for name, p in self.scorer.named_parameters()}
        is_zero3 = zero.zero_optimization_partition_weights()
        shares, trains = zero.optimizer, adamw is not None
        self._layout = Shares(shares, ranks.rank, trains) if is_zero3 else Partitions(shares, ranks)
        self._stretches = [self._layout.find(name, parameter) for name, parameter in parameters.items()]

    # --- forward and backward ----------------------------------------------------------------------------------

    def forward_backward(self, rows: Rows, loss_fn: LossFn, counts: Counts | None = None) -> Metrics:
        """See `protocol.Engine`."""
        scores_labels = self.scorer.scores_labels
        self._work += training_work(self.scorer.model.config, without_empty(rows), scores_labels, self._frozen)
        self._zero.train()
        return self._passes.run(rows, loss_fn, counts, True, f"step {self.step_count}", self.step_count)

    def measure(self, rows: Rows, loss_fn: LossFn, counts: Counts | None = None) -> Metrics:
        """See `protocol.Engine`."""
        self._zero.eval()
        with torch.no_grad():
            return self._passes.run(rows, loss_fn, counts, False, f"validation after step {self.step_count}")

    def infer(self, rows: Rows) -> Scores:
        """See `protocol.Engine`."""
        self._zero.eval()
        return self._passes.infer(rows)

    def _backward(self, loss: Tensor) -> None:
        """DeepSpeed averages over data ranks; our loss is a sum over a global count, so gradients add up."""
        self._zero.backward(loss * self.data_size, scale_wrt_gas=False)

    # --- the update --------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """See `protocol.Engine`. DeepSpeed itself takes the norm, clips, and passes over a gradient that is not finite;
        for a loss that is not, AdamW is held."""
        assert self._adamw is not None, "an engine built without optim only infers"
        lr = learning_rate(self._adamw.config, self.step_count, self.total_steps)
        loss, work = self._summed()
        self._adamw.prepare(self._updates + 1, lr, held=not isfinite(loss))
        with deadline("the update"):
            self._zero.step()
        norm = float(self._zero.get_global_grad_norm())
        skipped = not isfinite(norm + loss)
        self.step_count += 1
        self._updates += not skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self._refuse_non_finite(norm, loss)
        return StepReport(norm, lr, skipped, work)

    def _summed(self) -> tuple[float, Work]:
        """(loss, work) since the last step, over all ranks in one collective; both start again from zero."""
        work = torch.tensor(astuple(self._work), dtype=torch.float64, device=self.device)
        loss, *work_done = self.ranks.sum(torch.cat([self._passes.loss.reshape(1), work]), "the loss").tolist()
        self._passes.loss.zero_()
        self._work = Work()
        return loss, Work(*work_done)

    def _refuse_non_finite(self, norm: float, loss: float) -> None:
        what = f"step {self.step_count - 1}: loss {loss}, gradient norm {norm}"
        if self.config.non_finite is NonFinite.STOP:
            raise NonFiniteError(f"{what}; lower optim.lr, or pass over such steps: engine.non_finite=skip")
        if self._skipped_in_a_row > self.config.max_skips:
            raise NonFiniteError(f"{what}; more than engine.max_skips={self.config.max_skips} such steps in a row")

    # --- weights and states ------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `protocol.Engine`: the fp32 masters."""
        for stretch in self._stretches:
            yield stretch.name, self._whole(stretch)

    def _whole(self, stretch: Stretch) -> Tensor:
        """The sum of every rank's part and zeros elsewhere, taken of the bits: -0.0 + 0.0 would be 0.0."""
        bits = torch.zeros(stretch.shape.numel(), dtype=torch.int32, device=self.device)
        bits[stretch.start : stretch.start + len(stretch.master)] = stretch.master.float().view(torch.int32)
        return self.ranks.sum(bits, stretch.name).view(torch.float32).view(stretch.shape)

    def pieces(self, gradients: bool = False) -> Iterator[Piece]:
        """See `protocol.Engine`: of the fp32 masters. Gradients DeepSpeed reduces into buffers of its own."""
        for stretch in () if gradients else self._stretches:
            for box, part in stretch.parts(stretch.master):
                yield Piece(stretch.name, tuple(stretch.shape), box, part.float(), True)

    def fingerprints(self) -> dict[str, int]:
        """See `protocol.Engine`: of the fp32 masters, which `weights` gives."""
        return {s.name: _hash(s) for s in self._stretches if len(s.master)}

    def digest(self) -> str:
        """See `protocol.Engine`."""
        mine, names = self.fingerprints(), [stretch.name for stretch in self._stretches]
        hashes = torch.tensor([signed(mine.get(name, 0)) for name in names], device=self.device)
        total = self.ranks.sum(hashes, "the weights' hashes")
        return digest(dict(zip(names, total.tolist(), strict=True)))

    def shards(self) -> Iterator[tuple[str, Box, Tensor]]:
        """See `protocol.Engine`."""
        for stretch in self._stretches:
            for box, part in stretch.parts(stretch.master):
                yield f"model/{stretch.name}", box, part
        if self._adamw is None:
            return
        for kind, stretch, state in self._states(self._adamw):
            for box, part in stretch.parts(state):
                yield f"optim/{kind}/{stretch.name}", box, part
        if self.data_rank == 0:
            yield "optim/steps", _COUNTERS, torch.tensor([self.step_count, self._updates, self._skipped_in_a_row])

    def load_shards(self, read: ReadBox) -> None:
        """See `protocol.Engine`."""
        self._fill(lambda name, box: read(f"model/{name}", box))
        if self._adamw is None:
            return
        for kind, stretch, state in self._states(self._adamw):
            for box, part in stretch.parts(state):
                part.copy_(read(f"optim/{kind}/{stretch.name}", box))
        self.step_count, self._updates, self._skipped_in_a_row = read("optim/steps", _COUNTERS).tolist()

    def load_weights(self, read: ReadBox) -> None:
        """See `protocol.Engine`."""
        self._fill(read)
        self.step_count = self._updates = self._skipped_in_a_row = 0
        if self._adamw is not None:
            for _, _, state in self._states(self._adamw):
                state.zero_()

    def _states(self, adamw: FlatAdamW) -> Iterator[tuple[str, Stretch, Tensor]]:
        """(kind, stretch, its live state [n])."""
        for kind in KINDS:
            for stretch in self._stretches:
                if stretch.flat is not None:
                    yield kind, stretch, stretch.of(adamw.state_of(stretch.flat)[kind])

    def _fill(self, read: ReadBox) -> None:
        """Masters from `read`, then every compute copy from the masters. Gradients not yet used are forgotten."""
        self._passes.loss.zero_()
        self._work = Work()
        self._layout.forget()
        for stretch in self._stretches:
            for box, part in stretch.parts(stretch.master):
                part.copy_(read(stretch.name, box))
        with deadline("the gathering of weights"):
            self._layout.spread()


class _Leaves(nn.Module):
    """A Scorer whose answer is taken apart into a tuple of tensors: DeepSpeed's hooks look into nothing else."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = scorer
        self._spec: Any = None

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        leaves, self._spec = pytree.tree_flatten(self.scorer(*arguments, **keywords))
        return tuple(leaves)

    def whole_again(self, wrapped: nn.Module) -> Any:
        """The forward of `wrapped`, which leads here, with the answer put together again."""

        def score(*arguments: Any, **keywords: Any) -> Any:
            leaves = wrapped(*arguments, **keywords)
            return pytree.tree_unflatten(leaves, self._spec)

        return score


def _import_deepspeed(runtime: Runtime) -> Any:
    """DeepSpeed, told where it is before it guesses, and silent. It needs a process group even for one process."""
    os.environ["DS_ACCELERATOR"] = runtime.device.type
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))
    require_deepspeed()
    import deepspeed

    if runtime.device.type == "cpu":  # an op for shared memory, which would be compiled for two minutes first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # the calls are DeepSpeed's
    ensure_group(runtime.device)
    # It would clone the world without our deadline, once a process, and then wait half an hour for a rank that died.
    deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD
    return deepspeed


def _groups(scorer: Scorer, optim: OptimConfig) -> list[dict[str, Any]]:
    """What is decayed, and what is not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in scorer.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups[is_decayed(logical_name(name), shape)].append(parameter)
    decays = {True: optim.weight_decay, False: 0.0}
    return [{"params": group, "weight_decay": decays[kind]} for kind, group in groups.items() if group]


def _materialise(deepspeed: Any, scorer: Scorer, told: dict[str, Any], runtime: Runtime) -> None:
    """Storage for a Scorer on the meta device; under ZeRO-3 module by module, each cut before the next comes."""
    if told["zero_optimization"]["stage"] < 3:
        scorer.to_empty(device=runtime.device)
        return
    for module in scorer.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.to_empty(device=runtime.device, recurse=False)
            deepspeed.zero.Init(module=module, config_dict_or_path=told)
    # The head's parameters are used by a module that does not own them, and in its backward once more.
    if scorer.scores_labels:
        for parameter in filter(torch.is_tensor, (scorer.model.output_weight, scorer.model.output_bias)):
            deepspeed.zero.register_external_parameter(scorer.log_probs, parameter)


def _hash(stretch: Stretch) -> int:
    return sum(tensor_hash(part, box, stretch.shape) for box, part in stretch.parts(stretch.master.float())) % MODULUS
