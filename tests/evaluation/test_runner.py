"""Tasks against a generator that answers from a script, and against a real one."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framework.core.errors import UsageError
from framework.core.records import Message, PromptBatch, Rollout, whole
from framework.evaluation import runner
from framework.evaluation.runner import run_task, standard_error
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.native import NativeGenerator
from framework.models.config import ModelConfig
from framework.models.init import parameter_shapes, random_weights
from framework.tasks.metrics import bootstrap_error
from framework.tasks.task import Task

SAMPLING = SamplingConfig(max_tokens=4)
END = 256


class Bytes:
    """A tokenizer of bytes with one special token: it ends documents, begins them, and closes messages."""

    vocab_size, end_id, bos_id, fingerprint = 257, END, END, "bytes"

    def encode(self, text: str) -> list[int]:
        parts = text.split("|")
        return [i for n, part in enumerate(parts) for i in ([END] if n else []) + list(part.encode())]

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == END else bytes([token_id])

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        return "|" + "|".join(message.content for message in messages) + "|"


class Script:
    """A generator that answers prompt row r with `answers[r]`, and remembers what it was asked."""

    reads_apart = False

    def __init__(self, answers: list[str]):
        self.answers = answers
        self.asked: list[list[int]] = []

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig, samples: int = 1, seed: int = 0) -> Rollout:
        ids = [tokens[mask].tolist() for tokens, mask in zip(prompts.tokens, prompts.token_mask, strict=True)]
        self.asked += ids
        rows = [[*prompt, *self.answers[r].encode(), END] for prompt, r in zip(ids, prompts.row.tolist(), strict=True)]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.zeros(mask.shape, dtype=torch.int64)
        tokens[mask] = torch.tensor([token for row in rows for token in row])
        response = mask & (torch.arange(mask.shape[1]) >= prompts.token_mask.sum(1)[:, None])
        nothing = torch.zeros(mask.shape)
        finished = torch.ones(len(rows), dtype=torch.bool)
        return Rollout(tokens, mask, response, nothing, nothing, nothing, finished, prompts.row, prompts.row * 0)


def sums(count: int) -> Task[int]:
    return Task(
        name="sums",
        examples=lambda part: range(count) if part == "test" else [],
        prompt=lambda n: (Message("user", f"{n}+1"),),
        parse=lambda text: text.strip() if text.strip().isdigit() else None,
        score=lambda n, answer: float(int(answer) == n + 1),
    )


def test_answers_are_judged_one_by_one_and_averaged() -> None:
    generator = Script(["1", " 2 ", "none", "9"])  # right, right, no answer, wrong
    result = run_task(sums(4), generator, Bytes(), SAMPLING)
    assert (result.name, result.n, result.score) == ("sums", 4, 0.5)
    assert result.error == pytest.approx((1 / 3 / 4) ** 0.5)  # unbiased variance of 1, 1, 0, 0 is 1/3
    assert [(a.prompt, a.response, a.score) for a in result.answers] == [
        ("|0+1|", "1", 1.0), ("|1+1|", " 2 ", 1.0), ("|2+1|", "none", 0.0), ("|3+1|", "9", 0.0),
    ]  # fmt: skip
    assert generator.asked[3] == [END, *b"3+1", END]


def test_many_examples_go_in_several_calls_with_rows_of_their_own(monkeypatch) -> None:
    monkeypatch.setattr(runner, "_AT_ONCE", 3)
    told: list[int] = []
    result = run_task(sums(8), Script([str(n + 1) for n in range(8)]), Bytes(), SAMPLING, progress=told.append)
    assert result.score == 1.0  # each answer went to its own example
    assert told == [3, 6, 8]


def test_a_limit_takes_the_first_and_an_empty_part_is_refused() -> None:
    result = run_task(sums(8), Script(["1", "2", "3"]), Bytes(), SAMPLING, limit=3)
    assert (result.n, result.score) == (3, 1.0)
    with pytest.raises(UsageError, match="'sums' has no examples in its part 'valid'"):
        run_task(sums(8), Script([]), Bytes(), SAMPLING, part="valid")


def test_a_task_without_messages_asks_for_a_document() -> None:
    free = Task("free", lambda part: [None, None], lambda _: (), str.strip, lambda _, text: float(text == "a"))
    generator = Script(["a", "b"])
    assert run_task(free, generator, Bytes(), SAMPLING).score == 0.5
    assert generator.asked == [[END], [END]]


def test_the_same_arguments_give_the_same_result_and_another_seed_others() -> None:
    config = ModelConfig(vocab_size=257, hidden_size=32, num_layers=1, max_positions=64, init_std=0.2)
    generator = NativeGenerator(config, GenerationConfig(slots=3), (END,), "cpu")
    read = random_weights(config, 0)
    generator.load(((name, read(name, whole(shape))) for name, shape in parameter_shapes(config).items()), 0)
    task = sums(7)
    first = run_task(task, generator, Bytes(), SAMPLING, seed=1)
    assert run_task(task, generator, Bytes(), SAMPLING, seed=1) == first
    assert run_task(task, generator, Bytes(), SAMPLING, seed=2).answers != first.answers


@given(st.lists(st.floats(0, 1), min_size=2, max_size=60))
def test_the_closed_form_is_what_a_bootstrap_estimates(scores: list[float]) -> None:
    n = len(scores)
    bootstrap = bootstrap_error(scores, lambda values: sum(values) / len(values), rounds=400)
    closed = standard_error(scores) * ((n - 1) / n) ** 0.5  # the bootstrap's variance is the biased one
    assert closed == pytest.approx(bootstrap, rel=0.25, abs=1e-6)


def test_one_score_has_the_largest_error() -> None:
    assert standard_error([1.0]) == 0.5
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)
