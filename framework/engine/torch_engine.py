"""The engine on plain PyTorch: one process, or ranks that share out rows, parameters, matrices, places and layers.

Left out: the loop (`loop`), the losses (they come from stages and workers), which part goes where (`plan`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from math import isfinite

import torch
from torch import Tensor, nn

from framework.core.deadline import deadline
from framework.core.errors import NonFiniteError
from framework.core.records import Box, Counts, Metrics, ReadBox, Rows, Scores
from framework.core.runtime import Runtime
from framework.engine.balancing import Balancing
from framework.engine.config import EngineConfig, NonFinite
from framework.engine.dropping import Dropping
from framework.engine.flops import Work, training_work
from framework.engine.holdings import Holdings, Stage
from framework.engine.micro_batches import without_empty
from framework.engine.passes import Carrier, Passes, Straight
from framework.engine.pipelined import Pipelined
from framework.engine.plan import check, lay_out, stages_of
from framework.engine.precision import COMPUTE, MASTER, computing_in
from framework.engine.protocol import LossFn, Piece, StepReport
from framework.models.config import Base, LoraConfig, ModelConfig
from framework.models.lora import attach, quantise
from framework.models.scorer import Scorer, logical_name
from framework.models.transformer import Transformer
from framework.optim.adamw import AdamW
from framework.optim.config import OptimConfig
from framework.optim.schedule import learning_rate
from framework.parallel.collectives import DATA
from framework.parallel.config import ParallelConfig
from framework.parallel.mesh import Mesh, build_mesh
from framework.parallel.pipeline import Line
from framework.parallel.shard import local, reshard

_COUNTERS: Box = ((0, 3),)  # optim/steps: steps taken, updates made, steps skipped in a row


def build_torch_engine(
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
) -> "TorchEngine":
    """Build, lay out, and fill from `weights` part by part: no rank ever holds the whole model. Collective.

    `micro_size`: rows per forward (pairs count once). `optim` None: an engine that only infers. `temperature` divides
    the logits of every log-prob. `frozen`: logical names of parameters that do not learn; `lora`: the
    adapter that does; `seed`: of its dropout.
    """
    check(model, parallel, config, runtime.world_size, lora)
    mesh = build_mesh(parallel, runtime)

    def build(quantised: bool) -> Scorer:
        with torch.device("meta"):
            scorer = Scorer(Transformer(model, config.strict), value_head, num_classes, temperature)
        if lora is not None:
            attach(scorer.model, lora, seed)
        scorer.to(MASTER[config.precision]).requires_grad_(optim is not None)
        for name, parameter in scorer.model.named_parameters():  # a classifier has no language head to freeze
            if name in frozen:
                parameter.requires_grad_(False)
        if quantised:
            quantise(scorer.model)
        return scorer

    quantised = lora is not None and lora.base is not Base.FULL
    shapes = {logical_name(name): tuple(p.shape) for name, p in build(False).named_parameters()}
    stages = []
    for number, layers in stages_of(model, parallel, mesh):
        stages.append(lay_out(build(quantised), number, layers, parallel, mesh, config))
        stages[-1].scorer.to_empty(device=runtime.device)
    engine = TorchEngine(stages, shapes, mesh, parallel, config, micro_size, optim, total_steps, runtime.device, frozen)
    engine.load_weights(weights)
    return engine


class TorchEngine:
    """See `protocol.Engine`; `build_torch_engine` makes one."""

    def __init__(
        self,
        stages: Sequence[Stage],
        shapes: Mapping[str, tuple[int, ...]],
        mesh: Mesh,
        parallel: ParallelConfig,
        config: EngineConfig,
        micro_size: int,
        optim: OptimConfig | None,
        total_steps: int,
        device: torch.device,
        frozen: frozenset[str],
    ):
        self.config, self.micro_size, self.device, self.mesh = config, micro_size, device, mesh
        self.scorers = [stage.scorer for stage in stages]
        ranks = mesh.ranks(*DATA)
        self.data_rank, self.data_size = ranks.rank, ranks.size
        self.step_count, self.total_steps = 0, total_steps
        self._skipped_in_a_row = 0
        self._work, self._frozen = Work(), frozen
        balance = None
        if self.scorers[0].model.config.moe.balance:
            balance = Balancing([scorer.model for scorer in self.scorers], mesh.ranks("pipeline"), device)
        dropping = Dropping.of(self.scorers, micro_size, device)
        self._passes = Passes(self._carrier(stages, parallel), ranks, micro_size, device, balance, dropping)
        self.holdings = Holdings(stages, shapes, mesh)
        self.optimizer = None
        if optim is not None:
            learning = {name: x for name, x in self.holdings.locals().items() if name in self.holdings.learning}
            self.optimizer = AdamW(learning, {name: torch.Size(shapes[name]) for name in learning}, optim)

    def _carrier(self, stages: Sequence[Stage], parallel: ParallelConfig) -> Carrier:
        size = self.mesh.size("pipeline")
        if size == 1:
            return Straight(self.scorers[0], inside=self._precision)
        return Pipelined(
            [(stage.number, stage.scorer) for stage in stages],
            size * len(stages),
            Line(self.mesh, self.device, COMPUTE[self.config.precision]),
            self.mesh.ranks("pipeline"),
            self.mesh.ranks("tensor"),
            parallel.schedule,
            self._precision,
        )

    # --- forward and backward ----------------------------------------------------------------------------------

    def forward_backward(self, rows: Rows, loss_fn: LossFn, counts: Counts | None = None) -> Metrics:
        """See `protocol.Engine`."""
        scorer = self.scorers[0]
        self._work += training_work(scorer.model.config, without_empty(rows), scorer.scores_labels, self._frozen)
        self._train(True)
        return self._passes.run(rows, loss_fn, counts, True, f"step {self.step_count}", self.step_count)

    def measure(self, rows: Rows, loss_fn: LossFn, counts: Counts | None = None) -> Metrics:
        """See `protocol.Engine`."""
        self._train(False)
        with torch.no_grad():
            metrics = self._passes.run(rows, loss_fn, counts, False, f"validation after step {self.step_count}")
        self._reshard()
        return metrics

    def infer(self, rows: Rows) -> Scores:
        """See `protocol.Engine`."""
        self._train(False)
        scores = self._passes.infer(rows)
        self._reshard()
        return scores

    def _train(self, mode: bool) -> None:
        for scorer in self.scorers:
            scorer.train(mode)

    def _reshard(self) -> None:
        for scorer in self.scorers:
            reshard(scorer)

    def _precision(self) -> AbstractContextManager[None]:
        """FSDP2 casts by itself; without it the parameters are exchanged for the time being."""
        if self.mesh.sharing is not None:
            return nullcontext()
        return computing_in(COMPUTE[self.config.precision], nn.ModuleList(self.scorers))

    # --- the update --------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """See `protocol.Engine`."""
        assert self.optimizer is not None, "an engine built without optim only infers"
        config = self.optimizer.config
        with deadline(f"the update of step {self.step_count}"):
            gradients = self.holdings.gradients()
            norm, loss, work = self._summed(gradients)
        lr = learning_rate(config, self.step_count, self.total_steps)
        skipped = not isfinite(norm + loss)
        self.step_count += 1
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self._refuse_non_finite(norm, loss)
        else:
            scale = config.clip / (norm + 1e-6) if config.clip else 1.0  # as torch's clip_grad_norm_ does
            if scale < 1:
                torch._foreach_mul_(list(gradients.values()), scale)
            self.optimizer.step(gradients, lr)
        self._forget_gradients()
        return StepReport(norm, lr, skipped, work)

    def _summed(self, gradients: dict[str, Tensor]) -> tuple[float, float, Work]:
        """(gradient norm, loss, work) over all ranks in one collective. Squares add up in fp64, so that the norm does
        not depend on how the parameters are cut."""
        mine = [gradients[name] for name in self.holdings.owned if name in gradients]
        loss = self._passes.loss
        norms = torch._foreach_norm(mine, 2, dtype=torch.float64) if mine else [torch.zeros_like(loss)]
        work = torch.tensor(astuple(self._work), dtype=torch.float64, device=self.device)
        said = torch.cat([loss.unsqueeze(0), work]) * self.mesh.speaks_for_row
        table = torch.cat([torch.stack(norms).square().sum().unsqueeze(0), said])
        squares, total, *done = self.holdings.sum(table, "the gradient norm").tolist()
        return squares**0.5, total, Work(*done)

    def _refuse_non_finite(self, norm: float, loss: float) -> None:
        what = f"step {self.step_count - 1}: loss {loss}, gradient norm {norm}"
        if self.config.non_finite is NonFinite.STOP:
            raise NonFiniteError(f"{what}; lower optim.lr, or pass over such steps: engine.non_finite=skip")
        if self._skipped_in_a_row > self.config.max_skips:
            raise NonFiniteError(f"{what}; more than engine.max_skips={self.config.max_skips} such steps in a row")

    def _forget_gradients(self) -> None:
        for scorer in self.scorers:
            scorer.zero_grad(set_to_none=True)
        self._passes.loss.zero_()
        self._work = Work()

    # --- weights and states ------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `protocol.Engine`."""
        return self.holdings.weights()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(logical name, full tensor) of every gradient since the last step, one at a time, zero of what stands
        still. Collective."""
        mine = self.holdings.gradients()
        for name in self.holdings.shapes:
            yield name, self.holdings.whole(name, mine.get(name))

    def pieces(self, gradients: bool = False) -> Iterator[Piece]:
        """See `protocol.Engine`."""
        held, owned = self.holdings, set(self.holdings.owned)
        for name, tensor in (held.gradients() if gradients else held.locals()).items():
            yield Piece(name, tuple(held.shapes[name]), held.box(name), tensor, name in owned)

    def fingerprints(self) -> dict[str, int]:
        """See `protocol.Engine`."""
        return self.holdings.fingerprints()

    def digest(self) -> str:
        """See `protocol.Engine`."""
        return self.holdings.digest()

    def shards(self) -> Iterator[tuple[str, Box, Tensor]]:
        """See `protocol.Engine`."""
        owned = self.holdings.owned
        for name in owned:
            yield f"model/{name}", self.holdings.box(name), local(self.holdings.parameters[name])
        if self.optimizer is None:
            return
        for kind, name, state in self.optimizer.states():
            if name in owned:
                yield f"optim/{kind}/{name}", self.holdings.box(name), state
        if self.holdings.is_first:
            counters = [self.step_count, self.optimizer.updates, self._skipped_in_a_row]
            yield "optim/steps", _COUNTERS, torch.tensor(counters)

    def load_shards(self, read: ReadBox) -> None:
        """See `protocol.Engine`."""
        self._forget_gradients()
        self.holdings.fill(lambda name, box: read(f"model/{name}", box), quantised=False)
        if self.optimizer is None:
            return
        for kind, name, state in self.optimizer.states():
            if state.numel():
                state.copy_(read(f"optim/{kind}/{name}", self.holdings.box(name)))
        self.step_count, self.optimizer.updates, self._skipped_in_a_row = read("optim/steps", _COUNTERS).tolist()

    def load_weights(self, read: ReadBox) -> None:
        """See `protocol.Engine`."""
        self._forget_gradients()
        self.holdings.fill(read)
        self.step_count = self._skipped_in_a_row = 0
        if self.optimizer is not None:
            self.optimizer.reset()
