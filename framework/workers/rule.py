"""The reward where it is more than the reward model: a registered function of the response's text, or a task's score.

Left out: the reward model itself (`reward`), whose score a rule is shown; penalties for responses that never stopped,
which are the loop's.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from framework.cluster.marks import split_rows
from framework.core.errors import DataError, FrameworkError, UsageError, foreign, nearest
from framework.core.records import Completion, Message, PromptSample, Rollout, Tokenizer
from framework.core.registry import lookup, names, register
from framework.core.runtime import Runtime
from framework.data.chat_template import render_prompt
from framework.data.sources import open_sources, read_located
from framework.generation.stream import answer_text
from framework.generation.text import responses
from framework.tasks.task import PARTS, Task, get
from framework.tokenization.load import load as load_tokenizer
from framework.workers.config import MODEL, EngineSpec
from framework.workers.reward import Reward

RewardFunction = Callable[[Completion], float | None]


class Rule:
    """Scores by the reward called `name`. `spec`, where there is one, is the reward model's; `prompts` are the files of
    the run's prompts, in `format`, for the answers that may stand there."""

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        tokenizer: str,
        spec: EngineSpec | None,
        prompts: Sequence[str] = (),
        format: str = "auto",
    ):
        self.name = name
        self.tokenizer = load_tokenizer(tokenizer)
        self.references = read_references(prompts, format, self.tokenizer)
        found = find_reward(name)
        self.function = judge_by(found, self.tokenizer) if isinstance(found, Task) else found
        self.model = Reward(runtime, spec) if spec else None
        self.data_rank = self.model.data_rank if self.model else runtime.rank
        self.data_size = self.model.data_size if self.model else runtime.world_size

    @split_rows
    def score(self, rollout: Rollout) -> Tensor:
        """[B] float32: of each response."""
        scores = [None] * len(rollout) if self.model is None else self.model.score(rollout).tolist()
        texts = [answer_text(self.tokenizer, ids) for ids in responses(rollout)]
        prompts = _prompts(rollout, self.tokenizer)
        references = map(self.references.get, prompts)
        rows = zip(prompts, texts, rollout.finished.tolist(), scores, references, strict=True)
        return torch.tensor([self._number(Completion(*row)) for row in rows], dtype=torch.float32)

    def _number(self, completion: Completion) -> float:
        with foreign(f"ppo.reward={self.name} failed for the response {completion.response[:40]!r}"):
            value = self.function(completion)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise FrameworkError(
                f"ppo.reward={self.name} gave {value!r} for the response {completion.response[:40]!r}; it must give a "
                "finite number"
            )
        return number


@register("reward", MODEL)
def model_score(completion: Completion) -> float | None:
    """The reward model's score as it is."""
    return completion.score


def find_reward(name: str) -> RewardFunction | Task:
    """The reward registered under `name`, else the task. An unknown name is answered with the nearest of both."""
    if name in names("reward"):
        function: RewardFunction = lookup("reward", name)
        return function
    try:
        return get(name)
    except UsageError:
        raise UsageError(f"unknown reward '{name}': {nearest(name, [*names('reward'), *names('task')])}") from None


def judge_by(task: Task, tokenizer: Tokenizer) -> RewardFunction:
    """A task's score of what is answered to its prompts: those that it can recall, or those of its examples."""
    examples = [] if task.recall else [example for part in PARTS for example in task.examples(part)]
    known = {_text(task.prompt(example), tokenizer): example for example in examples}
    recall = task.recall or known.get

    def judge(completion: Completion) -> float:
        example = recall(completion.prompt)
        if example is None:
            raise UsageError(
                f"ppo.reward={task.name}: the prompt {completion.prompt[:40]!r} is none of the task's; take prompts of "
                "its examples as data.train and data.valid"
            )
        return task.judge(example, completion.response)

    return judge


def read_references(paths: Sequence[str], format: str, tokenizer: Tokenizer) -> dict[str, str]:
    """The answers that prompt files give, by the prompt's text as a Completion has it. DataError for a prompt that is
    given two answers."""
    found: dict[str, str] = {}
    for located in read_located(open_sources(list(paths), format)):
        sample = located.sample
        if not isinstance(sample, PromptSample) or sample.answer is None:
            continue
        prompt = _text(sample.prompt, tokenizer)
        if found.setdefault(prompt, sample.answer) != sample.answer:
            answers = f"{found[prompt][:40]!r} and {sample.answer[:40]!r}"
            raise DataError(f"the prompt {prompt[:40]!r} has two answers, {answers}", located.path, located.line)
    return found


def _text(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """A prompt as its ids read once they are decoded."""
    return tokenizer.decode(render_prompt(tokenizer, messages))


def _prompts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    masks = rollout.token_mask & ~rollout.response_mask
    return [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in zip(rollout.tokens, masks, strict=True)]
