"""The model beside transformers' own on one CPU: a forward, a training step, a compiled one, and decoding from a cache.

The quickstart's tiny Llama with random weights, in one folder that both load. A step is forward, loss, backward and
torch's fused AdamW, for both; all say their first loss. Decoding is greedy, 8 rows at once, so that all say the same
tokens. Rival: LlamaForCausalLM with its default attention (SDPA); compiled, `torch.compile` of the whole of it, where
ours compiles block by block as `engine.compile=true` does; `generate`, its KV cache as it comes, also beside our
compiled step.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.core import runtime
from framework.core.records import PromptBatch, TokenBatch, count, whole
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.native import NativeGenerator
from framework.models import hub
from framework.models.config import ModelConfig
from framework.models.init import parameter_shapes, random_weights
from framework.models.scorer import Scorer
from framework.stages.pretrain import token_loss
from tests.benchmarks.contest import Laps, Run, compete, options, report
from tests.benchmarks.material import INIT_STD

LR, PROMPT = 1e-3, 16


@dataclass(frozen=True)
class Task:
    """The same for all. A lap is `steps` forwards or steps, or one decoding of `new` tokens for each of 8 rows."""

    folder: Path
    width: int
    layers: int
    vocab: int
    rows: int
    places: int
    steps: int
    new: int
    threads: int

    def write(self) -> None:
        """The model that all load."""
        config = ModelConfig(
            vocab_size=self.vocab, hidden_size=self.width, num_layers=self.layers, num_heads=4, init_std=INIT_STD
        )
        read = random_weights(config, seed=0)
        weights = ((name, read(name, whole(shape))) for name, shape in parameter_shapes(config).items())
        hub.save_weights(config, weights, self.folder)

    def tokens(self, step: int, rows: int, places: int) -> Tensor:
        """[rows, places] random ids."""
        return torch.randint(self.vocab, (rows, places), generator=torch.Generator().manual_seed(step))


@dataclass(frozen=True)
class Raced:
    """A model: its logits and its mean loss of the next token, both of tokens[B,T]."""

    module: nn.Module
    logits: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor], Tensor]


def ours(task: Task, compiled: bool = False) -> Raced:
    """The Scorer, which keeps no logits, for the loss."""
    model = hub.load(task.folder)
    scorer = Scorer(model)
    for layer in model.layers.values():
        if compiled:
            layer.compile()

    def loss(tokens: Tensor) -> Tensor:
        every = torch.ones_like(tokens)
        labels, mask = tokens.roll(-1, 1), every.bool()
        mask[:, -1] = False
        rows = TokenBatch(tokens, labels, mask, torch.arange(tokens.shape[1]).expand(len(tokens), -1), every)
        value, _ = scorer(rows, token_loss=lambda log_probs, _, rows: token_loss(log_probs, None, rows, count(rows)))
        return value

    return Raced(scorer, lambda tokens: model.logits(model(tokens)), loss)


def theirs(task: Task, compiled: bool = False) -> Raced:
    """transformers'."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(task.folder).train()
    called = torch.compile(model) if compiled else model
    return Raced(model, lambda tokens: called(tokens).logits, lambda tokens: called(tokens, labels=tokens).loss)


Build = Callable[[Task], Raced]


def forward(place: Path, laps: Laps, task: Task, build: Build) -> None:
    """A lap is `steps` forwards without gradients, logits of every place with them."""
    runtime.start("cpu", task.threads)
    raced = build(task)
    with torch.no_grad():
        _ready(laps, raced, task)
        lap = 0
        while True:
            for step in range(task.steps):
                raced.logits(task.tokens(lap * task.steps + step, task.rows, task.places))
            lap += 1
            laps.done(task.steps * task.rows * task.places, 0)


def training(place: Path, laps: Laps, task: Task, build: Build) -> None:
    """A lap is `steps` training steps."""
    runtime.start("cpu", task.threads)
    raced = build(task)
    adamw = torch.optim.AdamW(raced.module.parameters(), lr=LR, fused=True)
    _ready(laps, raced, task)
    lap = 0
    while True:
        for step in range(task.steps):
            raced.loss(task.tokens(lap * task.steps + step, task.rows, task.places)).backward()
            adamw.step()
            adamw.zero_grad(set_to_none=True)
        lap += 1
        laps.done(task.steps * task.rows * task.places, 0)


def _ready(laps: Laps, raced: Raced, task: Task) -> None:
    with torch.no_grad():
        laps.ready({}, {"first loss": float(raced.loss(task.tokens(0, task.rows, task.places)))})


def our_decoding(place: Path, laps: Laps, task: Task, compiled: bool = False) -> None:
    """The native generator; `compiled`, with generation.compile=true."""
    runtime.start("cpu", task.threads)
    config, read, shapes = hub.read_folder(task.folder)
    generator = NativeGenerator(config, GenerationConfig(slots=8, compile=compiled), stop_ids=[])
    generator.load(((name, read(name, whole(shape))) for name, shape in shapes.items()), version=0)
    sampling = SamplingConfig(max_tokens=task.new, temperature=0.0)

    def decode(seed: int) -> Tensor:
        tokens = task.tokens(seed, 8, PROMPT)
        prompts = PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(8))
        return generator.generate(prompts, sampling).tokens[:, PROMPT:]

    _decoding(laps, task, decode)


def their_decoding(place: Path, laps: Laps, task: Task) -> None:
    """`generate`, which must not stop early."""
    import transformers

    runtime.start("cpu", task.threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(task.folder).eval()
    words = {"max_new_tokens": task.new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def decode(seed: int) -> Tensor:
        tokens = task.tokens(seed, 8, PROMPT)
        written: Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens), **words)
        return written[:, PROMPT:]

    _decoding(laps, task, decode)


@torch.no_grad()
def _decoding(laps: Laps, task: Task, decode: Callable[[int], Tensor]) -> None:
    laps.ready({"sum of the first tokens' ids": int(decode(0)[:, :4].sum())})
    lap = 0
    while True:
        lap += 1
        written = decode(lap)
        assert written.shape == (8, task.new)
        laps.done(8 * task.new, 0)


def contests(task: Task) -> dict[str, dict[str, Run]]:
    """By contest, ours first."""
    pairs: dict[str, dict[str, Run]] = {}
    for title, run in {"A forward": forward, "A training step": training}.items():
        builds: dict[str, Build] = {"framework": ours, "transformers": theirs}
        pairs[title] = {name: functools.partial(run, task=task, build=build) for name, build in builds.items()}
    compiled: dict[str, Build] = {
        "framework, compiled": functools.partial(ours, compiled=True),
        "transformers, compiled": functools.partial(theirs, compiled=True),
    }
    pairs["A compiled training step"] = {
        name: functools.partial(training, task=task, build=build) for name, build in compiled.items()
    }
    pairs["Decoding 8 rows"] = {
        "framework": functools.partial(our_decoding, task=task),
        "transformers' generate": functools.partial(their_decoding, task=task),
    }
    pairs["Decoding 8 rows, compiled"] = {
        "framework, compiled": functools.partial(our_decoding, task=task, compiled=True),
        "transformers' generate": functools.partial(their_decoding, task=task),
    }
    return pairs


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    sizes = {"width": 128, "layers": 4, "vocab": 3000, "rows": 16, "places": 128, "steps": 4, "new": 64, "threads": 1}
    args = vars(options(__doc__ or "", argv, rounds=12, **sizes))
    rounds, out = args.pop("rounds"), args.pop("out")
    with tempfile.TemporaryDirectory() as scratch:
        task = Task(folder=Path(scratch) / "model", **args)
        task.write()
        facts = {name: value for name, value in asdict(task).items() if name != "folder"}
        for number, (title, rivals) in enumerate(contests(task).items()):
            place = Path(scratch) / str(number)
            place.mkdir()
            report(title, compete(rivals, place, rounds), facts, out, unit="tokens")


if __name__ == "__main__":
    main()
