"""The Task: examples, the prompt of each, how to find the answer in a text, and what the answer is worth.

Tasks see text, never tokens or tensors; generating the texts is for those who hold a generator.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from framework.core.config import recipes_folder
from framework.core.errors import DataError
from framework.core.records import Message
from framework.core.registry import lookup

E = TypeVar("E")
PARTS = ("train", "valid", "test")
_OURS = ("framework.tasks.domain.verse",)


@dataclass(frozen=True)
class Task(Generic[E]):
    """What is asked of a model. Example: a task whose prompt is "2+2=" and whose answer is the first number:

    Task(
        name="sum", examples=lambda part: [4], prompt=lambda n: (Message("user", "2+2="),),
        parse=lambda text: (re.findall(r"[0-9]+", text) or [None])[0], score=lambda n, answer: float(int(answer) == n),
    )
    """

    name: str
    examples: Callable[[str], Sequence[E]]  # of one of PARTS
    prompt: Callable[[E], tuple[Message, ...]]  # () asks for a free sample of the model
    parse: Callable[[str], str | None]  # the answer within a generated text; None where there is none
    score: Callable[[E, str], float]  # of a parsed answer, in [0, 1]
    # The example that a prompt's text asks for, where the text says all; so prompts that are no example can be judged.
    recall: Callable[[str], E | None] | None = None

    def judge(self, example: E, text: str) -> float:
        """The score of a generated text, in [0, 1]; 0 where it holds no answer."""
        answer = self.parse(text)
        return 0.0 if answer is None else self.score(example, answer)


def get(name: str) -> Task:
    """The task registered under `name`, ours or an extension's: `@register("task", name)` on a function that makes it.

    An unknown name is a UsageError with the nearest one.
    """
    for module in _OURS:
        importlib.import_module(module)
    task: Task = lookup("task", name)()
    return task


def corpus_folder(name: str) -> Path:
    """The folder of a corpus that came with the recipes, in the installed package or in the checkout.

    Example: corpus_folder("tang") / "valid.txt". DataError where there is none of that name.
    """
    corpora = recipes_folder() / "corpora"
    folder = corpora / name
    if not folder.is_dir():
        known = sorted(path.name for path in corpora.glob("*/"))
        raise DataError(f"corpus '{name}' is not there; there are: {', '.join(known) or 'none'}", str(corpora))
    return folder
