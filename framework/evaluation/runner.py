"""Run a task against a generator: prompts in, answers judged by the task itself, a mean with its standard error out.

The same task object is SFT data and RL reward elsewhere; nothing here knows what it asks. Left out: judges that are
models, and scores from log-probabilities of given choices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from framework.core.errors import UsageError
from framework.core.records import Message, Tokenizer
from framework.generation.config import SamplingConfig
from framework.generation.protocol import Generator
from framework.generation.text import generate_text
from framework.tasks.task import Task

_AT_ONCE = 128  # prompts in one call of the generator: bounds its memory, and tells progress between calls


@dataclass(frozen=True)
class Answer:
    """What a model made of one example. Example: Answer("<|user|>2+2=<|end|><|assistant|>", "4", 1.0)."""

    prompt: str  # as the model read it; empty where a free sample was asked for
    response: str
    score: float  # in [0, 1]


@dataclass(frozen=True)
class TaskResult:
    """A task's outcome. Example: TaskResult("sum", score=0.75, error=0.25, answers of 4 examples)."""

    name: str
    score: float  # mean over the answers
    error: float  # standard error of that mean, over the choice of examples and the draw of answers
    answers: tuple[Answer, ...]

    @property
    def n(self) -> int:
        return len(self.answers)


def run_task(
    task: Task,
    generator: Generator,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    *,
    part: str = "test",
    limit: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """One answer to each of the first `limit` examples (0 = all) of `part`, judged. The same arguments give the same
    result. `progress` is told how many examples are done. A task without examples is a UsageError."""
    examples = list(task.examples(part))[: limit or None]
    if not examples:
        raise UsageError(f"task '{task.name}' has no examples in its part '{part}'; choose another part")
    prompts = [prompt_text(tokenizer, task.prompt(example)) for example in examples]
    responses: list[str] = []
    for start in range(0, len(prompts), _AT_ONCE):
        asked = prompts[start : start + _AT_ONCE]
        groups = generate_text(generator, tokenizer, asked, sampling, seed=seed, first_row=start)
        responses += [group[0] for group in groups]
        if progress is not None:
            progress(len(responses))
    scores = [task.judge(example, response) for example, response in zip(examples, responses, strict=True)]
    answers = tuple(map(Answer, prompts, responses, scores))
    return TaskResult(task.name, float(np.mean(scores)), standard_error(scores), answers)


def prompt_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The conversation up to where the answer begins; no messages ask for a document from its first token on."""
    return tokenizer.render(messages, generation_prompt=True) if messages else ""


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of scores in [0, 1]: sqrt(s^2 / n) with the unbiased variance. One score alone tells nothing of its
    spread and has 0.5, the largest standard deviation there is in [0, 1]."""
    if len(scores) == 1:
        return 0.5
    return float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
