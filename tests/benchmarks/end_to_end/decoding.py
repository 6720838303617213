"""Decoding: the native generator beside transformers' `generate`, with the same weights and prompts, greedy, in bf16.

Rivals: `generate` as it comes, and with its static cache, whose step it compiles on a card as ours does with
`generation.compile=true`. What each writes is compared: all of it in fp32, as tests do; in bf16 the first tokens, for
later ones part where two logits are as good as equal.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from framework.core.records import PromptBatch, whole
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.native import NativeGenerator
from framework.models import hub
from tests.benchmarks.end_to_end.card import Bench
from tests.benchmarks.end_to_end.llamas import VOCABULARY, llama, write

Decode = Callable[[Tensor], Tensor]  # prompts[B,P] -> what is written behind them [B,N]
RIVAL = "generate"


@dataclass(frozen=True)
class Task:
    """The same for all: a Llama, tokens of a prompt and of an answer, and how many rows are decoded together."""

    name: str
    prompt: int
    new: int
    batches: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    def prompts(self, rows: int) -> Tensor:
        """[rows, prompt] random ids."""
        generator = torch.Generator().manual_seed(rows)
        return torch.randint(VOCABULARY[self.name], (rows, self.prompt), generator=generator)


TASKS = (Task("350m", 128, 256, (1, 64)),)
TINY = (Task("tiny", 8, 16, (1, 4)),)


def run(bench: Bench, task: Task) -> None:
    """Lines of every batch, each side beside `generate`."""
    with tempfile.TemporaryDirectory() as place:
        folder = write(llama(task.name), Path(place))
        bench.forget()
        model = rival(bench, task, folder)
        for rows in task.batches:
            race(bench, task, decoders(bench, task, folder, model, rows), rows)


def race(bench: Bench, task: Task, sides: dict[str, Decode], rows: int) -> None:
    """Lines of one batch."""
    prompts = task.prompts(rows)
    written = {side: decode(prompts).cpu() for side, decode in sides.items()}
    figures = {side: {"% of first tokens equal": equal(task, text, written[RIVAL])} for side, text in written.items()}
    work = {side: partial(decode, prompts) for side, decode in sides.items()}
    case = f"{task.name}, {rows} rows, {task.prompt} + {task.new} tokens"
    bench.race("decoding", case, rows * task.new, "tokens", work, figures)


def equal(task: Task, ours: Tensor, theirs: Tensor) -> float:
    """Percent of rows that begin with the same token; ours must be as long, and in fp32 the same text."""
    assert ours.shape == theirs.shape == (len(ours), task.new), f"{[*ours.shape]} tokens, the rival {[*theirs.shape]}"
    assert task.dtype != torch.float32 or torch.equal(ours, theirs), "in fp32 all write one text"
    return 100 * float((ours[:, 0] == theirs[:, 0]).float().mean())


def decoders(bench: Bench, task: Task, folder: Path, model: Any, rows: int) -> dict[str, Decode]:
    """By side, ours first, the rival last."""
    sides = {"native": native(bench, task, folder, rows)}
    if bench.is_card:
        sides["native, compiled"] = native(bench, task, folder, rows, compiled=True)
    sides[f"{RIVAL}, static cache"] = generate(bench, task, model, cache_implementation="static")
    return sides | {RIVAL: generate(bench, task, model)}


def native(bench: Bench, task: Task, folder: Path, rows: int, compiled: bool = False) -> Decode:
    """Our generator, which nothing stops early."""
    config, read, shapes = hub.read_folder(folder)
    generation = GenerationConfig(slots=rows, compile=compiled)
    generator = NativeGenerator(config, generation, [], bench.here.device, dtype=task.dtype)
    generator.load(((name, read(name, whole(shape))) for name, shape in shapes.items()), version=0)
    greedy = SamplingConfig(max_tokens=task.new, temperature=0.0)

    def decode(prompts: Tensor) -> Tensor:
        batch = PromptBatch(prompts, torch.ones_like(prompts, dtype=torch.bool), torch.arange(len(prompts)))
        return generator.generate(batch, greedy).tokens[:, task.prompt :]

    return decode


def rival(bench: Bench, task: Task, folder: Path) -> Any:
    """transformers' model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=task.dtype)
    return model.to(bench.here.device).eval()


def generate(bench: Bench, task: Task, model: Any, **words: Any) -> Decode:
    """transformers' `generate`, which must not stop early."""
    words |= {"max_new_tokens": task.new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    @torch.no_grad()
    def decode(prompts: Tensor) -> Tensor:
        asked = prompts.to(bench.here.device)
        written: Tensor = model.generate(asked, attention_mask=torch.ones_like(asked), **words)
        return written[:, task.prompt :]

    return decode
