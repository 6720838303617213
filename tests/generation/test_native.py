"""The native generator against transformers, against the Scorer, and against itself under other schedules."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from framework.checkpoint.integrity import tensor_hash
from framework.core.errors import NonFiniteError, UsageError
from framework.core.records import PromptBatch, Rollout, align
from framework.core.runtime import num_threads
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.native import NativeGenerator
from framework.models import hub
from framework.models.config import Bias, ModelConfig, RopeScaling, Scaling
from framework.models.kv_cache import KVCache
from framework.models.scorer import Scorer
from tests.generation import tiny

SAMPLING = SamplingConfig(max_tokens=12, temperature=0.8)
WIDTH = 24


def same(a: Rollout, b: Rollout) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Rollout))


def trainer_log_probs(rollout: Rollout, temperature: float, micro: int, strict: bool) -> torch.Tensor:
    scorer = Scorer(tiny.model(strict), temperature=temperature)
    with torch.no_grad():
        return torch.cat([align(scorer(part).log_probs) for part in rollout.split(micro)])


def test_greedy_is_what_transformers_generates(tmp_path) -> None:
    hub.save(tiny.model(), tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    prompts = tiny.prompts(6)
    greedy = SamplingConfig(max_tokens=16, temperature=0.0)
    for strict in (False, True):
        ours = tiny.generator(strict, slots=2).generate(prompts, greedy)
        for b in range(len(prompts)):
            prompt = prompts.tokens[b][prompts.token_mask[b]][None]
            expected = theirs.generate(
                prompt,
                do_sample=False,
                max_new_tokens=16,
                eos_token_id=tiny.STOP,
                pad_token_id=0,
                attention_mask=torch.ones_like(prompt),
            )
            assert ours.tokens[b][ours.token_mask[b]].tolist() == expected[0].tolist()


def test_in_bf16_it_holds_rounded_weights_and_draws_as_transformers_in_bf16_would(tmp_path) -> None:
    hub.save(tiny.model(), tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = NativeGenerator(tiny.CONFIG, GenerationConfig(slots=2), (tiny.STOP,), dtype=torch.bfloat16)
    ours.load(tiny.pairs(), version=0)
    rounded = {name: tensor_hash(tensor.bfloat16()) for name, tensor in tiny.pairs()}
    assert ours.fingerprints() == rounded
    drawn = ours.generate(tiny.prompts(6), SAMPLING, samples=2, seed=1)
    assert drawn.log_probs.dtype == torch.float32
    with torch.no_grad():
        logits = theirs(drawn.tokens, attention_mask=drawn.token_mask.long()).logits
    said = (logits.float() / SAMPLING.temperature).log_softmax(-1)[:, :-1].gather(2, drawn.tokens[:, 1:, None])[..., 0]
    gap = (said - drawn.log_probs[:, 1:]).abs()[drawn.response_mask[:, 1:]]
    assert 0 < gap.mean() < 0.03  # bf16 keeps 8 bits of logits that are about 4
    exact = trainer_log_probs(drawn, SAMPLING.temperature, len(drawn), False)
    assert not torch.allclose(drawn.log_probs, exact * drawn.response_mask, atol=1e-3)


def test_a_rollout_is_well_formed() -> None:
    prompts = tiny.prompts(10)
    rollout = tiny.generator().generate(prompts, SAMPLING, samples=3, seed=1, width=WIDTH)
    assert rollout.tokens.shape == (30, WIDTH)
    assert rollout.row.tolist() == [40 + b for b in range(10) for _ in range(3)]
    assert rollout.sample.tolist() == [0, 1, 2] * 10
    assert len({tuple(t) for t in rollout.tokens[:3].tolist()}) == 3  # samples of a prompt differ
    for b in range(30):
        start, end = int(prompts.token_mask[b // 3].sum()), int(rollout.token_mask[b].sum())
        response = rollout.tokens[b, start:end].tolist()
        assert rollout.tokens[b, :start].tolist() == prompts.tokens[b // 3, :start].tolist()
        assert rollout.token_mask[b].tolist() == [t < end for t in range(WIDTH)]
        assert rollout.response_mask[b].tolist() == [start <= t < end for t in range(WIDTH)]
        assert rollout.positions[b].tolist() == [t if t < end else 0 for t in range(WIDTH)]
        assert rollout.policy_version[b].tolist() == [3 if start <= t < end else 0 for t in range(WIDTH)]
        assert not rollout.tokens[b, end:].any()
        assert torch.equal(rollout.log_probs[b] != 0, rollout.response_mask[b])
        assert tiny.STOP not in response[:-1]
        assert bool(rollout.finished[b]) == (response[-1] == tiny.STOP)
        assert rollout.finished[b] or len(response) == SAMPLING.max_tokens
    assert 0 < int(rollout.finished.sum()) < 30  # both ends occur, else this test shows nothing


def test_a_prompt_that_holds_the_stop_token_does_not_stop_and_the_last_token_may() -> None:
    free = tiny.generator(stop=()).generate(tiny.prompts(4), SAMPLING, width=WIDTH)
    assert not free.finished.any()
    assert free.response_mask.sum(1).tolist() == [12] * 4
    last = int(free.tokens[0][free.response_mask[0]][-1])
    earlier = free.tokens[0][free.response_mask[0]][:-1].tolist()
    stopping = tiny.generator(stop=(last,)).generate(tiny.prompts(4), SAMPLING, width=WIDTH)
    assert bool(stopping.finished[0])
    assert int(stopping.response_mask[0].sum()) == ([*earlier, last].index(last) + 1)
    prompt = PromptBatch(torch.tensor([[last, last]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([0]))
    assert int(tiny.generator(stop=(last,)).generate(prompt, SAMPLING).response_mask.sum()) > 0


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_strict_rows_do_not_depend_on_the_number_of_slots(slots: int) -> None:
    prompts = tiny.prompts(13)
    expected = tiny.generator(slots=5).generate(prompts, SAMPLING, samples=2, seed=4, width=WIDTH)
    assert same(tiny.generator(slots=slots).generate(prompts, SAMPLING, samples=2, seed=4, width=WIDTH), expected)


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(9)), st.integers(1, 9), st.integers(1, 10))
def test_strict_rows_do_not_depend_on_the_company(order: list[int], kept: int, slots: int) -> None:
    prompts, index = tiny.prompts(9), torch.tensor(order[:kept])
    everyone = tiny.generator(slots=4).generate(prompts, SAMPLING, seed=4, width=WIDTH)
    some = tiny.generator(slots=slots).generate(prompts.select(index), SAMPLING, seed=4, width=WIDTH)
    assert same(some, everyone.select(index))


def test_without_strict_mode_schedules_differ_in_rounding_alone() -> None:
    prompts = tiny.prompts(13)
    a, b = (tiny.generator(False, slots).generate(prompts, SAMPLING, seed=4, width=WIDTH) for slots in (2, 13))
    assert torch.equal(a.tokens, b.tokens)
    assert (a.log_probs - b.log_probs).abs().max() < 1e-4


def test_the_seed_the_row_and_the_sample_number_matter_and_nothing_else_does() -> None:
    prompts, made = tiny.prompts(4), tiny.generator()
    first = made.generate(prompts, SAMPLING, seed=4, width=WIDTH)
    assert same(first, made.generate(prompts, SAMPLING, seed=4, width=WIDTH))
    assert not torch.equal(first.tokens, made.generate(prompts, SAMPLING, seed=5, width=WIDTH).tokens)
    moved = replace(prompts, row=prompts.row + 1)
    assert not torch.equal(first.tokens, made.generate(moved, SAMPLING, seed=4, width=WIDTH).tokens)
    twice = made.generate(prompts, SAMPLING, samples=2, seed=4, width=WIDTH)
    assert same(first, twice.select(twice.sample == 0))


@pytest.mark.parametrize(("threads", "temperature"), [(1, 1.0), (1, 0.7), (2, 0.7)])
def test_strict_log_probs_are_the_trainers_bit_for_bit(threads: int, temperature: float) -> None:
    sampling = SamplingConfig(max_tokens=12, temperature=temperature, top_k=20)
    with num_threads(threads):
        rollout = tiny.generator(slots=6).generate(tiny.prompts(16), sampling, seed=2, width=WIDTH)
        micro_batched = [trainer_log_probs(rollout, temperature, micro, strict=True) for micro in (5, 16)]
        row_by_row = trainer_log_probs(rollout.select(slice(0, 2)), temperature, 1, strict=True)
    assert rollout.response_mask.sum() > 100
    for trainer in (*micro_batched, row_by_row):
        part = rollout.select(slice(0, len(trainer)))
        gap = torch.where(part.response_mask, part.log_probs - trainer, 0.0)
        assert gap.abs().max() == 0.0


def test_cached_decoding_is_a_forward_over_the_whole_row() -> None:
    rollout = tiny.generator(strict=False).generate(tiny.prompts(8), SAMPLING, seed=2, width=WIDTH)
    whole_rows = trainer_log_probs(rollout, SAMPLING.temperature, 8, strict=False)
    gap = torch.where(rollout.response_mask, rollout.log_probs - whole_rows, 0.0)
    assert 0 < gap.abs().max() < 1e-4


def test_an_untied_grouped_model_with_biases_agrees_with_its_trainer_too(monkeypatch) -> None:
    config = ModelConfig(
        vocab_size=51, hidden_size=48, num_layers=1, num_heads=6, num_kv_heads=3, attention_bias=Bias.ALL, tied=False,
        max_positions=64, init_std=0.3,
    )  # fmt: skip
    monkeypatch.setattr(tiny, "CONFIG", config)
    rollout = tiny.generator(config=config).generate(tiny.prompts(9), SAMPLING, seed=2, width=WIDTH)
    scorer = Scorer(tiny.model(True, config), temperature=SAMPLING.temperature)
    with torch.no_grad():
        trainer = align(scorer(rollout).log_probs)
    assert torch.equal(torch.where(rollout.response_mask, trainer, 0.0), rollout.log_probs)


def test_a_compiled_step_gives_the_tokens_of_the_plain_one() -> None:
    """Slots are refilled at other times, and some are free at the end."""
    prompts, greedy = tiny.prompts(7), SamplingConfig(max_tokens=12, temperature=0.0)
    stop = tuple(range(0, 50, 6))
    made = NativeGenerator(tiny.CONFIG, GenerationConfig(slots=3, compile=True), stop, "cpu")
    made.load(tiny.pairs(), version=3)
    for sampling in (greedy, SAMPLING):
        plain = tiny.generator(strict=False, slots=3, stop=stop).generate(prompts, sampling, seed=4, width=WIDTH)
        compiled = made.generate(prompts, sampling, seed=4, width=WIDTH)
        assert torch.equal(compiled.tokens, plain.tokens)
        assert 0 < (compiled.log_probs - plain.log_probs).abs().max() < 1e-4  # it was another program that ran
    assert len(set(plain.response_mask.sum(1).tolist())) > 2
    made.load(tiny.pairs(seed=9), version=4)  # weights are read anew, not kept by the graph
    plain = tiny.generator(strict=False, slots=3, stop=stop, seed=9).generate(prompts, greedy, width=WIDTH)
    assert torch.equal(made.generate(prompts, greedy, width=WIDTH).tokens, plain.tokens)


def test_compiled_and_strict_exclude_each_other() -> None:
    with pytest.raises(UsageError, match=r"generation.compile=true .* strict=true may not"):
        GenerationConfig(strict=True, compile=True)


def test_joined_products_are_the_live_weights() -> None:
    """Not strict, so that q, k, v and gate, up are rows of one matrix each: what is loaded is what is multiplied."""
    made = tiny.generator(strict=False)
    assert made.fingerprints() == {name: tensor_hash(tensor) for name, tensor in tiny.pairs()}
    attention = made._model.layers["0"].attention
    assert torch.equal(
        attention.joined.weight, torch.cat([part.weight for part in (attention.q, attention.k, attention.v)])
    )
    assert attention.k.weight.untyped_storage().data_ptr() == attention.joined.weight.untyped_storage().data_ptr()


def test_streaming_gives_the_tokens_of_generate() -> None:
    made = tiny.generator()
    prompt = [3, 1, 4]
    batch = PromptBatch(torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([0]))
    for seed in range(6):
        rollout = made.generate(batch, SAMPLING, seed=seed)
        expected = rollout.tokens[0][rollout.response_mask[0]].tolist()
        if rollout.finished[0]:
            expected = expected[:-1]
        assert list(made.stream(prompt, SAMPLING, seed)) == expected


def test_weights_come_in_parts_and_only_a_whole_policy_generates() -> None:
    made = NativeGenerator(tiny.CONFIG, GenerationConfig(), (), "cpu")
    weights = tiny.pairs()
    with pytest.raises(UsageError, match="were not loaded"):
        made.generate(tiny.prompts(2), SAMPLING)
    made.load(weights[:3], version=1)
    with pytest.raises(UsageError, match=f"{len(weights) - 3} of the generator's {len(weights)} tensors"):
        made.generate(tiny.prompts(2), SAMPLING)
    made.load(weights[3:], version=1)
    expected = tiny.generator(strict=False, stop=()).generate(tiny.prompts(2), SAMPLING)
    assert torch.equal(made.generate(tiny.prompts(2), SAMPLING).tokens, expected.tokens)
    made.load(tiny.pairs(seed=9)[:1], version=2)
    with pytest.raises(UsageError, match="not loaded with version 2"):
        made.generate(tiny.prompts(2), SAMPLING)


def test_foreign_tensors_are_refused_by_name_and_shape() -> None:
    made = NativeGenerator(tiny.CONFIG, GenerationConfig(), (), "cpu")
    with pytest.raises(UsageError, match=r"no tensor 'layers.0.attention.w': did you mean 'layers.0.attention"):
        made.load([("layers.0.attention.w", torch.zeros(1))], 0)
    with pytest.raises(UsageError, match=r"'norm.weight' is \[31\]; this model's is \[32\]"):
        made.load([("norm.weight", torch.zeros(31))], 0)


def test_weights_are_its_own_and_fingerprints_are_of_the_live_ones() -> None:
    made, weights = tiny.generator(), tiny.pairs()
    assert made.fingerprints() == {name: tensor_hash(tensor) for name, tensor in weights}
    before = made.fingerprints()
    weights[0][1].zero_()
    assert made.fingerprints() == before
    made.load(weights[:1], version=4)
    assert made.fingerprints()["embedding.weight"] == tensor_hash(weights[0][1]) != before["embedding.weight"]


def one_prompt(ids: list[int], length: int | None = None) -> PromptBatch:
    length = len(ids) if length is None else length
    return PromptBatch(torch.tensor([ids]), torch.arange(len(ids))[None] < length, torch.tensor([5]))


@pytest.mark.parametrize(
    ("prompt", "width", "message"),
    [
        (one_prompt([1, 2], 0), None, r"prompt 0 \(row 5\) is empty"),
        (
            one_prompt([1] * 53),
            None,
            r"53 tokens; with max_tokens=12 it does not fit into model.max_positions=64.*up to 52",
        ),
        (one_prompt([1] * 9), 20, r"9 tokens; with max_tokens=12 it does not fit into the row width=20.*up to 8"),
        (one_prompt([1]), 12, r"the row width=12: max_tokens must be below 12"),
        (one_prompt([1, 50]), None, r"holds token 50; the model's vocabulary has 50"),
        (replace(one_prompt([1, 2]), token_mask=torch.tensor([[False, True]])), None, "padded on the right"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(prompt: PromptBatch, width: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny.generator().generate(prompt, SAMPLING, width=width)


def test_dynamic_scaling_is_decoded_within_its_context_and_refused_beyond() -> None:
    """A cache's keys stand by the base of their time; within the context of 16 that is the trainer's, to the last
    bit."""
    config = replace(tiny.CONFIG, rope_scaling=RopeScaling(Scaling.DYNAMIC, 4.0, 16))
    short = tiny.prompts(9, longest=4)
    rollout = tiny.generator(config=config).generate(short, SAMPLING, seed=2, width=WIDTH)
    assert int(rollout.token_mask.sum(1).max()) == 16
    with torch.no_grad():
        trainer = align(Scorer(tiny.model(True, config), temperature=SAMPLING.temperature)(rollout).log_probs)
    assert torch.equal(torch.where(rollout.response_mask, trainer, 0.0), rollout.log_probs)
    with pytest.raises(UsageError, match=r"5 tokens; .* dynamic rotary scaling .*original_positions=16: .* up to 4"):
        tiny.generator(config=config).generate(one_prompt([1] * 5), SAMPLING, width=WIDTH)
    cache = KVCache(config, 1, 24)
    with pytest.raises(IndexError):
        tiny.model(config=config)(torch.tensor([[3]]), positions=torch.tensor([[16]]), cache=cache.view())


def test_the_longest_prompt_that_fits_is_answered() -> None:
    rollout = tiny.generator(stop=()).generate(one_prompt([1] * 52), SAMPLING, width=64)
    assert bool(rollout.token_mask.all())


def test_non_finite_weights_are_an_error_and_not_a_token() -> None:
    made = tiny.generator()
    made.load([(name, tensor * float("nan")) for name, tensor in tiny.pairs()], version=4)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        made.generate(tiny.prompts(2), SAMPLING)


def test_no_prompts_give_no_rows() -> None:
    rollout = tiny.generator().generate(tiny.prompts(3).select(slice(0, 0)), SAMPLING, width=WIDTH)
    assert rollout.tokens.shape == (0, WIDTH)
