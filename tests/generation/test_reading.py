"""Answers of models whose encoder reads prompts: against transformers, the Scorer, other schedules; and the command.

Models of T5's kinds and one of our own axes, weights drawn so widely that answers differ from each other.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.core.errors import UsageError
from framework.core.records import PromptBatch, Rollout, TokenBatch, align
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.native import NativeGenerator
from framework.generation.text import generate_text, load_generator, prompt_ids, stream_text, text_apart
from framework.main import main
from framework.models import hub
from framework.models.config import Activation, Architecture, ModelConfig, Position
from framework.models.scorer import Scorer
from framework.models.transformer import Transformer
from tests.generation import tiny
from tests.models.drawn import drawn as ours_drawn
from tests.models.test_families import drawn

OURS = ModelConfig(
    Architecture.ENCODER_DECODER, vocab_size=50, hidden_size=32, num_layers=2, encoder_layers=3, num_heads=4,
    num_kv_heads=2, max_positions=64, qk_norm=True,
)  # fmt: skip
T5 = replace(
    OURS, position=Position.RELATIVE, relative_buckets=8, relative_distance=12, scaled_scores=False, num_kv_heads=0,
    activation=Activation.GEGLU_TANH, tied=False, qk_norm=False,
)  # fmt: skip
SAMPLING = SamplingConfig(max_tokens=12, temperature=0.8)
GREEDY = SamplingConfig(max_tokens=16, temperature=0.0)
START, STOPS = 5, tuple(range(0, 50, 7))


def generator(config: ModelConfig, **settings: Any) -> NativeGenerator:
    made = NativeGenerator(config, GenerationConfig(**settings), STOPS, "cpu", start_id=START)
    made.load(ours_drawn(config).named_parameters(), version=3)
    return made


def same(a: Rollout, b: Rollout) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Rollout))


def trainer_log_probs(rollout: Rollout, prompts: PromptBatch, model: Transformer, temperature: float) -> torch.Tensor:
    """What a Scorer says of the rows that answered `prompts`, which an encoder reads."""
    inputs, asked = rollout.inputs(), prompts.select(rollout.row - int(prompts.row[0]))
    nothing, real = torch.zeros_like(asked.tokens), asked.token_mask.long()
    source = TokenBatch(asked.tokens, nothing, nothing.bool(), nothing, real)
    with torch.no_grad():
        return align(Scorer(model, temperature=temperature)(replace(inputs, source=source)).log_probs)


@pytest.mark.parametrize("config", [OURS, T5], ids=["rotary, grouped", "t5"])
@pytest.mark.parametrize("strict", [True, False])
def test_log_probs_are_the_scorer_s_of_rows_and_what_was_read(config: ModelConfig, strict: bool) -> None:
    """Slots are refilled; in strict mode the same bits."""
    prompts = tiny.prompts(9)
    rollout = generator(config, slots=4, strict=strict).generate(prompts, SAMPLING, samples=2, seed=2)
    assert len(set(rollout.response_mask.sum(1).tolist())) > 5
    model = ours_drawn(config, strict)
    gap = trainer_log_probs(rollout, prompts, model, 0.8) - rollout.log_probs
    gap = torch.where(rollout.response_mask, gap, 0.0).abs().max()
    assert gap == 0 if strict else 0 < gap < 1e-5


def test_a_row_is_the_start_token_and_the_answer() -> None:
    prompts = tiny.prompts(3)
    rollout = generator(T5).generate(prompts, SAMPLING, samples=2)
    assert rollout.tokens.shape == (6, 13)
    assert rollout.tokens[:, 0].tolist() == [START] * 6
    assert rollout.row.tolist() == [40, 40, 41, 41, 42, 42]
    assert not rollout.response_mask[:, 0].any()
    assert torch.equal(rollout.response_mask[:, 1:], rollout.token_mask[:, 1:])
    assert not torch.equal(rollout.tokens[0], rollout.tokens[1])


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 7), st.integers(1, 9), st.booleans())
def test_rows_do_not_depend_on_the_company(order: list[int], kept: int, slots: int, strict: bool) -> None:
    """To rounding; in strict mode to the last bit."""
    prompts, index = tiny.prompts(7), torch.tensor(order[:kept])
    everyone = generator(T5, slots=4, strict=strict).generate(prompts, SAMPLING, seed=4).select(index)
    some = generator(T5, slots=slots, strict=strict).generate(prompts.select(index), SAMPLING, seed=4)
    assert torch.equal(some.tokens, everyone.tokens)
    assert (some.log_probs - everyone.log_probs).abs().max() < 1e-5
    assert not strict or same(some, everyone)


def test_each_prompt_is_read_once_whatever_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    read, encode = list[list[int]](), Transformer.encode

    def counted(self: Transformer, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        read.extend(tokens.tolist())
        return encode(self, tokens, *rest)

    monkeypatch.setattr(Transformer, "encode", counted)
    prompts = tiny.prompts(5)
    for slots in (2, 4, 64):
        read.clear()
        generator(T5, slots=slots).generate(prompts, SAMPLING, samples=3)
        assert read == torch.where(prompts.token_mask, prompts.tokens, 0).tolist()


@pytest.mark.nightly
def test_a_compiled_step_gives_the_tokens_of_the_plain_one() -> None:
    prompts = tiny.prompts(7)
    plain = generator(T5, slots=3).generate(prompts, SAMPLING, seed=4)
    compiled = generator(T5, slots=3, compile=True).generate(prompts, SAMPLING, seed=4)
    assert torch.equal(compiled.tokens, plain.tokens)
    assert (compiled.log_probs - plain.log_probs).abs().max() < 1e-4


KINDS = {
    "1.0": {},
    "1.1, untied, a deeper decoder": {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3,
    },
}  # fmt: skip
PIECES = ["▁", *"abcdefgh", "▁a", "▁b", "▁the", "ab", "cd", "ef", "gh", "▁de", "▁fa", "ing", "▁in"]


def published(folder: Path, kind: dict[str, Any]) -> Any:
    """A T5 and its tokenizer as transformers writes them; what the model begins with stands in config.json alone."""
    vocabulary = [(p, 0.0) for p in ("<pad>", "</s>", "<unk>")] + [(p, -2 - i / 9) for i, p in enumerate(PIECES)]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=3)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 42, "num_layers": 2, "num_heads": 3}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 13}
    config = transformers.T5Config(
        vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes, **buckets, **kind
    )
    torch.manual_seed(5)
    theirs = drawn(transformers.T5ForConditionalGeneration(config))
    with torch.no_grad():  # what is read must matter: else all answers are the first token again and again
        for name, weight in theirs.named_parameters():
            weight.mul_(4 if "EncDecAttention" in name else 1)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return theirs, tokenizer


TEXTS = ["the abc", "de fa gh in", "a", "bing the cab ef ef gh ab", "in", "cd the the"]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_greedy_text_is_what_transformers_generates(kind: dict[str, Any], tmp_path: Path) -> None:
    """In two slots, so that all but the first texts are answered in slots that held others."""
    theirs, their_tokenizer = published(tmp_path, kind)
    made, tokenizer = load_generator(str(tmp_path), GenerationConfig(slots=2), "cpu")
    answers = [group[0] for group in generate_text(made, tokenizer, TEXTS, GREEDY)]
    inputs = [their_tokenizer(text, return_tensors="pt") for text in TEXTS]
    expected = [theirs.generate(**x, do_sample=False, use_cache=False, max_new_tokens=16)[0] for x in inputs]
    assert answers == [their_tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len(set(answers)) >= 5
    assert len({len(ids) for ids in expected}) >= 3  # some end by themselves, and the others at the limit


def test_the_command_answers_a_t5_and_chat_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, tokenizer = published(tmp_path, KINDS["1.0"])
    capsys.readouterr()
    command = ["generate", str(tmp_path), *TEXTS[:2], "--temperature", "0", "--max-tokens", "7", "--device", "cpu"]
    for raw in ([], ["--raw"]):
        assert main([*command, *raw]) == 0
        told = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [prompt for prompt, _ in told] == TEXTS[:2]
        for prompt, answer in told:
            ids = theirs.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=7)[0]
            assert answer == tokenizer.decode(ids, skip_special_tokens=True)
    assert main(["chat", str(tmp_path)]) == 2
    assert "chat does not take a model of architecture=encoder_decoder" in capsys.readouterr().err


def test_a_text_for_an_encoder_ends_once_and_an_answer_does_not_begin_with_a_space(tmp_path: Path) -> None:
    published(tmp_path, {})
    made, tokenizer = load_generator(str(tmp_path), GenerationConfig(), "cpu")
    assert prompt_ids(tokenizer, "the ab", ended=True) == [*tokenizer.encode("the ab"), 1]
    assert prompt_ids(tokenizer, "the ab</s>", ended=True) == [*tokenizer.encode("the ab"), 1]
    assert prompt_ids(tokenizer, "", ended=True) == [1]
    assert prompt_ids(tokenizer, [4, 5], ended=True) == [4, 5]
    assert text_apart(tokenizer, tokenizer.encode("the ab")) == "the ab"
    with pytest.raises(UsageError, match="answers a text with a whole one"):
        next(stream_text(made, tokenizer, "the", GREEDY))


def test_what_a_folder_says_its_decoder_begins_with_goes_before_its_tokenizer(tmp_path: Path) -> None:
    published(tmp_path, {})
    (tmp_path / "generation_config.json").unlink()
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"decoder_start_token_id": 0', '"decoder_start_token_id": 4'))
    assert hub.read_start(tmp_path) == load_generator(str(tmp_path), GenerationConfig(), "cpu")[0].start_id == 4
    (tmp_path / "generation_config.json").write_text('{"decoder_start_token_id": 6}')
    assert hub.read_start(tmp_path) == 6
    config.write_text(config.read_text().replace('"decoder_start_token_id": 4', '"unknown": 4'))
    (tmp_path / "generation_config.json").unlink()
    assert hub.read_start(tmp_path) is None
    assert load_generator(str(tmp_path), GenerationConfig(), "cpu")[0].start_id == 0  # the tokenizer's <pad>


def test_what_does_not_fit_is_refused() -> None:
    long = tiny.prompts(2, longest=70)
    long = replace(long, token_mask=torch.ones_like(long.token_mask))
    assert generator(T5).generate(long, SAMPLING).tokens.shape == (2, 13)  # relative positions have no end
    with pytest.raises(UsageError, match=r"prompt 0 has 70 tokens; the encoder reads model\.max_positions=64"):
        generator(OURS).generate(long, SAMPLING)
    with pytest.raises(UsageError, match="max_tokens=12 behind a start token does not fit into rows of 12"):
        generator(T5).generate(tiny.prompts(2), SAMPLING, width=12)
    with pytest.raises(UsageError, match=r"max_tokens=64 behind a start token .* at most 63"):
        generator(OURS).generate(tiny.prompts(2), SamplingConfig(max_tokens=64))
    with pytest.raises(UsageError, match="start_id=50 is no token of the model's vocabulary of 50"):
        NativeGenerator(T5, GenerationConfig(), (), start_id=50)
