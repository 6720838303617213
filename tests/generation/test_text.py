"""Text through a model folder and back: answers, streaming, and what stands in front of a prompt."""

import pytest

from framework.core.errors import UsageError
from framework.core.records import Message
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.text import generate_text, load_generator, prompt_ids, stream_text
from framework.models.config import ModelConfig
from framework.models.hub import save_weights
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.train import train
from tests.generation import tiny

CORPUS = "春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少"
SAMPLING = SamplingConfig(max_tokens=20)


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train(iter([CORPUS]), TokenizerConfig(kind=TokenizerKind.CHARACTER, vocab_size=300)).save(str(folder))
    config = ModelConfig(vocab_size=300, hidden_size=32, num_layers=1, max_positions=64, init_std=0.2)
    save_weights(config, tiny.pairs(config), folder)
    return load_generator(str(folder), GenerationConfig(slots=3), "cpu")


def test_answers_come_in_groups_and_do_not_depend_on_the_other_prompts(model_and_tokenizer) -> None:
    prompts = ["春眠", "夜來風", [5, 6]]
    answers = generate_text(*model_and_tokenizer, prompts, SAMPLING, samples=2, seed=1)
    assert [len(group) for group in answers] == [2, 2, 2]
    assert answers[0][0] != answers[0][1]
    assert generate_text(*model_and_tokenizer, prompts[:1], SAMPLING, samples=2, seed=1) == answers[:1]
    assert not any("<|end|>" in text for group in answers for text in group)
    assert generate_text(*model_and_tokenizer, [], SAMPLING) == []


def test_the_pieces_of_a_stream_are_the_answer(model_and_tokenizer) -> None:
    for seed in range(8):  # random weights spell many bytes that are no characters: they must come out alike too
        pieces = list(stream_text(*model_and_tokenizer, "春眠", SAMPLING, seed))
        assert "".join(pieces) == generate_text(*model_and_tokenizer, ["春眠"], SAMPLING, seed=seed)[0][0]
        assert len(pieces) > 1


def test_a_document_begins_with_its_token_and_a_rendered_conversation_as_it_was_trained(model_and_tokenizer) -> None:
    _, tokenizer = model_and_tokenizer
    assert tokenizer.bos_id is not None
    assert prompt_ids(tokenizer, "春") == [tokenizer.bos_id, *tokenizer.encode("春")]
    assert prompt_ids(tokenizer, "") == [tokenizer.bos_id]
    rendered = tokenizer.render([Message("user", "春")], generation_prompt=True)
    assert prompt_ids(tokenizer, rendered) == tokenizer.encode(rendered)
    assert prompt_ids(tokenizer, (5, 6)) == [5, 6]


def test_an_empty_prompt_is_refused(model_and_tokenizer) -> None:
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        generate_text(*model_and_tokenizer, ["春", []], SAMPLING)
