"""How many bytes the fullest rank holds under a layout: states, what is gathered or cast meanwhile, activations.

States are counted parameter by parameter, as the engine cuts them: a weight, its gradient, AdamW's two moments (ZeRO:
Rajbhandari et al. 2020, section 3.1); FSDP2, torch's fully_shard, cuts every parameter's first dimension. Activations
stand in `activations`. The sum is of the fullest instant once gradients exist, in forward and backward or in an update.
Left out: the allocator's slack, what collectives hold inside, the rows themselves, what a process is before a model; of
DeepSpeed, the buckets of stage 1; with offload, what waits in host memory is counted all the same.
"""

from dataclasses import dataclass, replace
from math import prod

from framework.models.config import ModelConfig
from framework.parallel.config import ContextForm, ParallelConfig
from framework.planning import activations
from framework.planning.activations import Load
from framework.planning.parameters import Entry, Table, block, count, encoder_blocks, root

UPDATED_AT_ONCE = 1 << 24  # elements, as optim.adamw; three temporaries stand beside them
LIVE, BUCKET = 10**9, 1 << 26  # elements: DeepSpeed's stage3_max_live_parameters, and engine.deepspeed_settings' bucket


@dataclass(frozen=True)
class Numbers:
    """Bytes of an element: of the master weights, gradients and moments, and of what is computed with, by kernels or
    without."""

    master: int = 4
    compute: int = 4
    kernel: bool = False
    fused_norms: bool = False  # also another library's


@dataclass(frozen=True)
class Batch:
    """Of one data rank. Example: Batch(rows=4, length=512, micros=2); rows are of one micro-batch (pairs: both sides).

    `classes`: rows of a value or class head in place of the language head. `packed`: several documents a row.
    """

    rows: int
    length: int
    micros: int = 2
    classes: int = 0
    packed: bool = True


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank; `gathered` and `activations` stand there in forward and backward, `update` after them.

    Example, 1,000 parameters in fp32 on one process: weights 4,000, gradients 4,000, optimizer 8,000, update 12,000.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    update: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + max(self.gathered + self.activations, self.update)

    def learning(self, share: float) -> "RankMemory":
        """The same where only that share of the elements learns, spread evenly over the ranks: of the others there is a
        weight and nothing else."""
        gradients, optimizer, update = (int(x * share) for x in (self.gradients, self.optimizer, self.update))
        return replace(self, gradients=gradients, optimizer=optimizer, update=update)


def fullest(
    model: ModelConfig, batch: Batch, parallel: ParallelConfig, world_size: int, numbers: Numbers = Numbers()
) -> RankMemory:
    """What the rank that holds most holds."""
    return max(by_place(model, batch, parallel, world_size, numbers), key=lambda memory: memory.total)


def by_place(
    model: ModelConfig, batch: Batch, parallel: ParallelConfig, world_size: int, numbers: Numbers = Numbers()
) -> list[RankMemory]:
    """For each place in the pipeline and among tensor ranks, what the fullest rank there holds."""
    sizes = parallel.sizes(world_size)
    kind = _ZeroRank if parallel.zero else _Rank
    places = [(stage, part) for stage in range(sizes["pipeline"]) for part in range(sizes["tensor"])]
    return [kind(model, batch, parallel, world_size, numbers, *place).memory() for place in places]


class _Rank:
    """One rank at a place of the pipeline and among tensor ranks; of the ranks that share out parameters the first,
    which holds most."""

    def __init__(
        self,
        model: ModelConfig,
        batch: Batch,
        parallel: ParallelConfig,
        world_size: int,
        numbers: Numbers,
        stage: int,
        part: int,
    ):
        sizes = parallel.sizes(world_size)
        self.model, self.batch, self.parallel, self.numbers = model, batch, parallel, numbers
        self.stage, self.part = stage, part
        self.tensor, self.pipeline, context = sizes["tensor"], sizes["pipeline"], sizes["context"]
        self.shard = world_size if parallel.zero else sizes["data_shard"] * (1 if parallel.shard == 1 else context)
        self.fsdp = world_size > self.tensor * self.pipeline
        ranks = self.tensor, context, parallel.context_form is ContextForm.RING
        self.load = Load(
            batch.rows, batch.length, numbers.compute, batch.packed, *ranks, numbers.kernel, numbers.fused_norms
        )
        self.spans = _spans(model, self.pipeline, parallel.stages_per_rank, stage)
        roots = [root(model, s.start == 0, s.stop == model.num_layers, batch.classes) for s in self.spans]
        self.roots = [entry for table in roots for entry in table]
        self.blocks = [block(model, layer) for span in self.spans for layer in span] + encoder_blocks(model)
        self.table = self.roots + [entry for table in self.blocks for entry in table]

    def memory(self) -> RankMemory:
        held = {kind: sum(self._held(e) for e in self.table if e.decayed is kind) for kind in (True, False)}
        largest = 0 if self.parallel.zero else max(self._held(entry) for entry in self.table)
        size = sum(held.values()) * self.numbers.master
        update = 3 * min(max(UPDATED_AT_ONCE, largest), max(held.values())) * self.numbers.master
        gathered, kept = max(self._instants(), key=sum)
        return RankMemory(size, size, 2 * size, gathered, kept, update)

    # --- parameters --------------------------------------------------------------------------------------------------

    def _held(self, entry: Entry) -> int:
        """Elements that this rank holds for good."""
        first, *rest = entry.on(self.part, self.tensor)
        return -(-first // self.shard) * prod(rest)

    def _whole(self, table: Table) -> int:
        """Elements of this tensor rank's part, not shared out."""
        return sum(prod(entry.on(self.part, self.tensor)) for entry in table)

    def _gathered(self, backward: bool) -> int:
        """FSDP2: the root from the first forward to the last backward, and in turn a block: of forward what the
        collective gave; of backward the block, the next one, its gradients, and those on their way (in fp32). Without
        it, a copy of all in the dtype that computes."""
        e, w = self.numbers.compute, self.numbers.master
        blocks, roots = max(map(self._whole, self.blocks)), self._whole(self.roots)
        if not self.fsdp:
            return self._whole(self.table) * e if e < w else 0
        if self.shard == 1:  # nothing to gather, but torch copies all the same
            return (2 * roots * e + blocks * (e + w)) if backward else roots * e
        return 2 * roots * e + blocks * (3 * e + w) if backward else (roots + blocks) * e

    # --- forward and backward ----------------------------------------------------------------------------------------

    def _instants(self) -> list[tuple[int, int]]:
        """(gathered, activations) when a micro-batch's logits have their gradients, and when its last block has."""
        kept, head, again = self._in_flight(), self._head(), self.parallel.recompute
        working = (activations.block_working(self.model, self.load, again, layer) for s in self.spans for layer in s)
        at_blocks = kept - head + max(working)
        at_head = kept + activations.head_working(self.model, self.load) if head else 0
        return [(self._gathered(backward=False), at_head), (self._gathered(backward=True), at_blocks)]

    def _in_flight(self) -> int:
        """What all micro-batches under way at once keep; the most of any moment."""
        each = [self._kept(span) for span in self.spans]
        if self.pipeline == 1:
            return each[0]
        from framework.parallel.pipeline import order  # torch, which only a pipeline has to wait for

        micros = -(-self.batch.micros // self.pipeline) * self.pipeline if len(each) > 1 else self.batch.micros
        held = most = 0
        for work in order(self.parallel.schedule, self.stage, self.pipeline, micros):
            held += each[work.chunk] if work.forward else -each[work.chunk]
            most = max(most, held)
        return most

    def _kept(self, span: range) -> int:
        """By one micro-batch in one stage. What a stage gave waits there with what it took in."""
        model, load, again = self.model, self.load, self.parallel.recompute
        blocks = sum(activations.block_kept(model, load, again, layer) for layer in span)
        kept = blocks + activations.shared_kept(model, load, again)
        if span.stop == model.num_layers:
            return kept + activations.head_kept(model, load, not self.batch.classes)
        return kept + load.places // load.tensor * model.hidden_size * load.compute

    def _head(self) -> int:
        """What one micro-batch keeps at the end of the model; 0 where that is elsewhere or has no logits."""
        ends = self.spans[-1].stop == self.model.num_layers and not self.batch.classes
        return activations.head_kept(self.model, self.load) if ends else 0


class _ZeroRank(_Rank):
    """DeepSpeed's, which keeps a copy in the dtype that computes besides fp32 masters. Stages 1 and 2 cut all that is
    decayed, and the rest, flat in equal parts; stage 1 gives every rank all gradients. Stage 3 cuts each parameter;
    what it has gathered it lets go beyond 1e9 parameters only, and its gradients wait in a bucket that stays."""

    def memory(self) -> RankMemory:
        zero, ranks, whole = self.parallel.zero, self.shard, count(self.table)
        apart = [[entry.size for entry in self.table if entry.decayed is kind] for kind in (True, False)]
        if zero == 3:
            held = [sum(-(-size // ranks) for size in sizes) for sizes in apart]
        else:
            held = [2 * -(-sum(sizes) // (2 * ranks)) for sizes in apart]
        size = 4 * sum(held)
        gathered, kept = max(self._instants(), key=sum)
        update = 3 * 4 * min(UPDATED_AT_ONCE, max(held))
        return RankMemory(size, 4 * whole if zero == 1 else size, 2 * size, gathered, kept, update)

    def _gathered(self, backward: bool) -> int:
        whole, e = count(self.table), self.numbers.compute
        if self.parallel.zero < 3:
            return whole * e
        return -(-whole // self.shard) * e + min(whole, LIVE) * e + 4 * min(whole, BUCKET)

    def _instants(self) -> list[tuple[int, int]]:
        """Stages 2 and 3 have one more, the end of backward, with two buckets' worth besides: in stage 2 the bucket and
        the copy that is reduced; in stage 3, whose bucket stays, that copy (`reduce_scatter_coalesced`) and gloo's."""
        buckets = 2 * 4 * min(count(self.table), BUCKET) if self.parallel.zero > 1 else 0
        return [*super()._instants(), (self._gathered(backward=True) + buckets, 0)]


def _spans(model: ModelConfig, pipeline: int, chunks: int, place: int) -> list[range]:
    """The layers of each stage at this place, as `engine.plan.stages_of` cuts them."""
    if pipeline == 1:
        return [range(model.num_layers)]
    from framework.parallel.pipeline import partition  # torch, which only a pipeline has to wait for

    layer = sum(entry.size for entry in block(model) if len(entry.shape) == 2)
    stages = partition([layer] * model.num_layers, (0.0, model.vocab_size * model.hidden_size), pipeline * chunks)
    return stages[place::pipeline]
