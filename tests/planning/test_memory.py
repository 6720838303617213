"""States to the byte against engines that really hold them, on ranks; and what is gathered and kept, worked by hand."""

from typing import Any

import pytest
import torch.distributed.fsdp  # noqa: F401  (imported once, before the ranks are forked)

from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig, Precision
from framework.engine.precision import MASTER
from framework.models.config import Activation, ModelConfig, MoeConfig, Norm, Position
from framework.parallel.config import ParallelConfig, Recompute, Schedule
from framework.planning.activations import Load, block_kept, head_kept, shared_kept
from framework.planning.memory import Batch, Numbers, by_place, fullest
from framework.planning.parameters import num_parameters
from tests.distributed import run_ranks
from tests.engine.cases import WIDTH, build, language_loss, packed
from tests.engine.lattice import MODEL

AWKWARD = ModelConfig(
    vocab_size=37, hidden_size=12, num_layers=5, num_heads=4, num_kv_heads=4, intermediate_size=22, tied=False,
    norm=Norm.LAYER, activation=Activation.GELU, position=Position.LEARNED, max_positions=19, mlp_bias=True,
)  # fmt: skip
EXPERTS = ModelConfig(
    vocab_size=37, hidden_size=16, num_layers=6, num_heads=4, num_kv_heads=4, intermediate_size=22,
    moe=MoeConfig(experts=3, top_k=2, intermediate_size=7, shared=9, shared_gate=True, first=1, every=2),
)  # fmt: skip
MODELS = {1: (MODEL, AWKWARD), 2: (MODEL, AWKWARD), 4: (MODEL, AWKWARD, EXPERTS)}  # by the number of ranks
ON_ONE = {"single": ParallelConfig(), "zero2": ParallelConfig("zero2", zero=2)}
ON_TWO = {
    "ddp": ParallelConfig("ddp"),
    "fsdp": ParallelConfig("fsdp", shard=0),
    "cp": ParallelConfig("cp", shard=0, context=0),
    "cp, whole parameters": ParallelConfig("cp", context=0),
    "zero1": ParallelConfig("zero1", zero=1),
    "zero2": ParallelConfig("zero2", zero=2),
    "zero3": ParallelConfig("zero3", zero=3),
}
ON_FOUR = {
    "hsdp": ParallelConfig("hsdp", shard=2),
    "tp": ParallelConfig("tp", tensor=0),
    "fsdp_tp": ParallelConfig("fsdp_tp", shard=0, tensor=2),
    "pp": ParallelConfig("pp", pipeline=0),
    "3d": ParallelConfig("3d", tensor=2, pipeline=2),
    "interleaved": ParallelConfig("interleaved", shard=0, pipeline=2, schedule=Schedule.INTERLEAVED),
}
BATCH = Batch(rows=2, length=WIDTH)


def held(runtime: Runtime, layouts: dict[str, ParallelConfig], precision: Precision) -> dict[str, Any]:
    """(weights, gradients, moments) in bytes that this rank holds after a backward, by layout and model."""
    found: dict[str, Any] = {}
    for name, parallel in layouts.items():
        for model in MODELS[runtime.world_size]:
            engine: Any = build(runtime, parallel, EngineConfig(precision=precision), model=model)
            engine.forward_backward(packed(4), language_loss)
            found[name, model.num_layers] = flat_parts(engine) if parallel.zero else parts(engine)
    return found


def parts(engine: Any) -> tuple[int, int, int]:
    states = sum(state.nbytes for _, _, state in engine.optimizer.states())
    return _bytes(engine.holdings.locals().values()), _bytes(engine.holdings.gradients().values()), states


def flat_parts(engine: Any) -> tuple[int, int]:
    """DeepSpeed's: masters and moments, padding included; its gradients lie in several places of its own."""
    masters = {s.flat.data_ptr(): s.flat for s in engine._stretches if s.flat is not None}.values()
    moments = [engine._adamw.state_of(stretch).values() for stretch in masters]
    return _bytes(masters), sum(_bytes(each) for each in moments)


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("world", "layouts", "precision"),
    [(1, ON_ONE, Precision.FP32), (2, ON_TWO, Precision.BF16), (4, ON_FOUR, Precision.FP64)],
    ids=["1", "2", "4"],
)
def test_states_are_what_engines_hold(world: int, layouts: dict[str, ParallelConfig], precision: Precision) -> None:
    ranks = run_ranks(held, world, layouts, precision, timeout_s=120)
    numbers = Numbers(master=MASTER[precision].itemsize)
    for name, parallel in layouts.items():
        for model in MODELS[world]:
            real = [rank[name, model.num_layers] for rank in ranks]
            ours = max(by_place(model, BATCH, parallel, world, numbers), key=lambda memory: memory.states)
            said = (ours.weights, ours.optimizer) if parallel.zero else (ours.weights, ours.gradients, ours.optimizer)
            assert max(real, key=sum) == said, (name, model)


# --- by hand ---------------------------------------------------------------------------------------------------------

LLAMA = ModelConfig(vocab_size=64, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=32)
BLOCK = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
ROOT = 64 * 16 + 16
LOAD = Load(2, WIDTH)


def micro_batch(layers: int, again: Recompute = Recompute.NONE) -> int:
    return layers * block_kept(LLAMA, LOAD, again) + shared_kept(LLAMA, LOAD, again)


def test_one_process_by_hand() -> None:
    memory = fullest(LLAMA, BATCH, ParallelConfig(), 1)
    whole = 4 * (4 * BLOCK + ROOT)
    assert num_parameters(LLAMA) * 4 == whole
    assert (memory.weights, memory.gradients, memory.optimizer, memory.gathered) == (whole, whole, 2 * whole, 0)
    assert memory.activations == micro_batch(4) + head_kept(LLAMA, LOAD) + 2 * 2 * WIDTH * 64 * 4
    assert memory.update == 3 * 4 * 4 * (BLOCK - 2 * 16)  # all that is decayed: matrices but the embedding
    assert memory.total == 4 * whole + max(memory.activations, memory.update)


def test_bf16_adds_a_copy_of_all_and_nothing_to_the_states() -> None:
    wide, narrow = (fullest(LLAMA, BATCH, ParallelConfig(), 1, Numbers(4, compute)) for compute in (4, 2))
    assert narrow.states == wide.states
    assert narrow.gathered == 2 * num_parameters(LLAMA)


def test_two_ranks_share_out_states_and_gather_in_turn() -> None:
    memory = fullest(LLAMA, BATCH, ParallelConfig("fsdp", shard=0), 2)
    assert memory.states == 16 * (4 * BLOCK + ROOT) // 2
    assert memory.gathered in (4 * (ROOT + BLOCK), 4 * (2 * ROOT + 4 * BLOCK))


@pytest.mark.parametrize(("schedule", "micros", "waiting"), [("gpipe", 5, 5), ("1f1b", 5, 2), ("1f1b", 1, 1)])
def test_a_pipeline_keeps_the_micro_batches_under_way(schedule: str, micros: int, waiting: int) -> None:
    parallel = ParallelConfig("pp", pipeline=2, schedule=Schedule(schedule))
    first, last = by_place(LLAMA, Batch(2, WIDTH, micros), parallel, 2)
    given = LOAD.places * 16 * 4
    beside = first.activations - waiting * (micro_batch(2) + given)
    assert beside == by_place(LLAMA, Batch(2, WIDTH, 1), parallel, 2)[0].activations - micro_batch(2) - given
    assert first.weights == 4 * (2 * BLOCK + 64 * 16)
    assert last.weights == 4 * (2 * BLOCK + ROOT)  # the tied matrix stands at both ends


def test_full_recomputation_trades_a_block_for_all() -> None:
    none, full = (
        fullest(LLAMA, BATCH, ParallelConfig(recompute=again), 1).activations
        for again in (Recompute.NONE, Recompute.FULL)
    )
    assert none - full > 2 * block_kept(LLAMA, LOAD, Recompute.NONE)


def test_zero_1_gives_every_rank_all_gradients_and_zero_2_its_share() -> None:
    one, two = (fullest(LLAMA, Batch(1, 1), ParallelConfig(f"zero{n}", zero=n), 2) for n in (1, 2))
    whole = 4 * num_parameters(LLAMA)
    assert (one.weights, one.gradients, one.optimizer) == (whole // 2, whole, whole)
    assert (two.weights, two.gradients, two.optimizer) == (whole // 2, whole // 2, whole)
    assert one.gathered == whole
    assert two.gathered == 3 * whole  # and at the end of backward a full bucket, and what is reduced of it
