"""The engine on plain PyTorch: one process, or data parallel with the states shared out by FSDP2 or replicated.

Left out: the loop (`loop`), the losses (they come from stages and workers), tensor, context and pipeline parallelism.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from math import isfinite

import torch
from torch import Tensor

from framework.checkpoint.integrity import signed, tensor_hash
from framework.core.config import digest
from framework.core.errors import NonFiniteError
from framework.core.records import Box, Counts, Metrics, ReadBox, Rows, Scores
from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig, NonFinite
from framework.engine.flops import Work, training_work
from framework.engine.micro_batches import without_empty
from framework.engine.passes import Passes, Straight
from framework.engine.precision import COMPUTE, MASTER, computing_in
from framework.engine.protocol import LossFn, StepReport
from framework.models.config import ModelConfig
from framework.models.scorer import Scorer, logical_name
from framework.models.transformer import Transformer
from framework.optim.adamw import AdamW
from framework.optim.config import OptimConfig
from framework.optim.schedule import learning_rate
from framework.parallel.apply import apply
from framework.parallel.collectives import Ranks, deadline
from framework.parallel.config import ParallelConfig
from framework.parallel.mesh import build_mesh
from framework.parallel.shard import box_of, full, is_owner, local, reshard

_COUNTERS: Box = ((0, 3),)  # optim/steps: steps taken, updates made, steps skipped in a row


def build_engine(
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
) -> "TorchEngine":
    """Build, lay out, and fill from `weights` part by part: no rank ever holds the whole model. Collective.

    `micro_size`: rows per forward (pairs count once). `optim` None: an engine that only infers. `temperature` divides
    the logits of every log-prob.
    """
    with torch.device("meta"):
        scorer = Scorer(Transformer(model, config.strict), value_head, num_classes, temperature)
    scorer.to(MASTER[config.precision]).requires_grad_(optim is not None)
    mesh = build_mesh(parallel, runtime)
    blocks = [f"model.layers.{name}" for name in scorer.model.layers]
    apply(scorer, blocks, mesh, compile=config.compile, compute=COMPUTE[config.precision])
    scorer.to_empty(device=runtime.device)
    engine = TorchEngine(scorer, Ranks(mesh), config, micro_size, optim, total_steps, runtime.device)
    engine.load_weights(weights)
    return engine


class TorchEngine:
    """See `protocol.Engine`; `build_engine` makes one."""

    def __init__(
        self,
        scorer: Scorer,
        ranks: Ranks,
        config: EngineConfig,
        micro_size: int,
        optim: OptimConfig | None,
        total_steps: int,
        device: torch.device,
    ):
        self.scorer, self.config, self.micro_size, self.device = scorer, config, micro_size, device
        self.ranks, self.data_rank, self.data_size = ranks, ranks.rank, ranks.size
        self.step_count, self.total_steps = 0, total_steps
        self._skipped_in_a_row = 0
        self._work = Work()
        self._passes = Passes(Straight(scorer, inside=self._precision), ranks, micro_size, device)
        self._parameters = {logical_name(name): p for name, p in scorer.named_parameters()}
        shapes = {name: p.shape for name, p in self._parameters.items()}
        parts = {name: local(p) for name, p in self._parameters.items()}
        self.optimizer = None if optim is None else AdamW(parts, shapes, optim)

    # --- forward and backward ----------------------------------------------------------------------------------

    def forward_backward(self, rows: Rows, loss_fn: LossFn, counts: Counts | None = None) -> Metrics:
        """See `protocol.Engine`."""
        self._work += training_work(self.scorer.model.config, without_empty(rows), self.scorer.scores_labels)
        self.scorer.train()
        return self._passes.run(rows, loss_fn, counts, True, f"step {self.step_count}")

    def measure(self, rows: Rows, loss_fn: LossFn, counts: Counts | None = None) -> Metrics:
        """See `protocol.Engine`."""
        self.scorer.eval()
        with torch.no_grad():
            metrics = self._passes.run(rows, loss_fn, counts, False, f"validation after step {self.step_count}")
        reshard(self.scorer)
        return metrics

    def infer(self, rows: Rows) -> Scores:
        """See `protocol.Engine`."""
        self.scorer.eval()
        scores = self._passes.infer(rows)
        reshard(self.scorer)
        return scores

    def _precision(self) -> AbstractContextManager[None]:
        """FSDP2 casts by itself; without it the parameters are exchanged for the time being."""
        whole = self.ranks.group is None
        return computing_in(COMPUTE[self.config.precision], self.scorer) if whole else nullcontext()

    # --- the update --------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """See `protocol.Engine`."""
        assert self.optimizer is not None, "an engine built without optim only infers"
        config = self.optimizer.config
        gradients = {name: _gradient(p) for name, p in self._parameters.items()}
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
        is_first = self.data_rank == 0
        mine = [g for name, g in gradients.items() if is_owner(self._parameters[name], is_first)]
        norms = torch._foreach_norm(mine, 2, dtype=torch.float64) if mine else [torch.zeros_like(self._passes.loss)]
        squares = torch.stack(norms).square().sum()
        work = torch.tensor(astuple(self._work), dtype=torch.float64, device=self.device)
        total = self.ranks.sum(
            torch.cat([torch.stack([squares, self._passes.loss]), work]), "the gradient norm"
        ).tolist()
        return total[0] ** 0.5, total[1], Work(*total[2:])

    def _refuse_non_finite(self, norm: float, loss: float) -> None:
        what = f"step {self.step_count - 1}: loss {loss}, gradient norm {norm}"
        if self.config.non_finite is NonFinite.STOP:
            raise NonFiniteError(f"{what}; lower optim.lr, or pass over such steps: engine.non_finite=skip")
        if self._skipped_in_a_row > self.config.max_skips:
            raise NonFiniteError(f"{what}; more than engine.max_skips={self.config.max_skips} such steps in a row")

    def _forget_gradients(self) -> None:
        self.scorer.zero_grad(set_to_none=True)
        self._passes.loss.zero_()
        self._work = Work()

    # --- weights and states ------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `protocol.Engine`."""
        for name, parameter in self._parameters.items():
            with deadline(f"the gathering of {name}"):
                weight = full(parameter)
            yield name, weight

    def fingerprints(self) -> dict[str, int]:
        """See `protocol.Engine`."""
        is_first = self.data_rank == 0
        mine = {name: p for name, p in self._parameters.items() if is_owner(p, is_first)}
        return {name: tensor_hash(local(p), box_of(p), p.shape) for name, p in mine.items()}

    def digest(self) -> str:
        """See `protocol.Engine`."""
        mine = self.fingerprints()
        hashes = [signed(mine.get(name, 0)) for name in self._parameters]
        total = self.ranks.sum(torch.tensor(hashes, device=self.device), "the weights' hashes")
        return digest(dict(zip(self._parameters, total.tolist(), strict=True)))

    def shards(self) -> Iterator[tuple[str, Box, Tensor]]:
        """See `protocol.Engine`."""
        is_first = self.data_rank == 0
        for name, parameter in self._parameters.items():
            if is_owner(parameter, is_first):
                yield f"model/{name}", box_of(parameter), local(parameter)
        if self.optimizer is None:
            return
        for kind, name, state in self.optimizer.states():
            if is_owner(self._parameters[name], is_first):
                yield f"optim/{kind}/{name}", box_of(self._parameters[name]), state
        if is_first:
            counters = [self.step_count, self.optimizer.updates, self._skipped_in_a_row]
            yield "optim/steps", _COUNTERS, torch.tensor(counters)

    def load_shards(self, read: ReadBox) -> None:
        """See `protocol.Engine`."""
        self._fill(lambda name, box: read(f"model/{name}", box))
        if self.optimizer is None:
            return
        for kind, name, state in self.optimizer.states():
            if state.numel():
                state.copy_(read(f"optim/{kind}/{name}", box_of(self._parameters[name])))
        self.step_count, self.optimizer.updates, self._skipped_in_a_row = read("optim/steps", _COUNTERS).tolist()

    def load_weights(self, read: ReadBox) -> None:
        """See `protocol.Engine`."""
        self._fill(read)
        self.step_count = self._skipped_in_a_row = 0
        if self.optimizer is not None:
            self.optimizer.reset()

    def _fill(self, read: ReadBox) -> None:
        self._forget_gradients()
        for name, parameter in self._parameters.items():
            part = local(parameter)
            if part.numel():
                part.copy_(read(name, box_of(parameter)))


def _gradient(parameter: Tensor) -> Tensor:
    """This rank's part; zero for a parameter that no loss has reached."""
    return torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)
