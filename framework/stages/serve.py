"""`framework generate` and `framework chat`: a finished model in the terminal. Serving over a network is left out."""

import argparse
import sys

from framework.core.config import require
from framework.core.errors import UsageError
from framework.core.records import Message
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.generation.text import generate_text, load_generator, stream_text
from framework.models.hub import locate, read_architecture
from framework.stages.words import Words
from framework.tracking.remote import brought


def generate(words: list[str]) -> int:
    """Sample from a model; prompts from the words, or one a line from standard input. Of a model with an encoder they
    are texts as they are, each answered by another."""
    parser = _parser("generate", "sample from a finished model")
    parser.add_argument("prompt", nargs="*", help="none: one prompt a line is read from standard input")
    parser.add_argument("--samples", type=int, default=1, help="answers a prompt")
    parser.add_argument("--raw", action="store_true", help="the text as it is, without the chat template; continue it")
    chosen = parser.parse_args(words)
    model, sampling = _model(chosen.model), _sampling(chosen)
    prompts = chosen.prompt or [line.rstrip("\n") for line in sys.stdin]
    generator, tokenizer = load_generator(model, GenerationConfig(), chosen.device)
    raw = chosen.raw or generator.reads_apart
    texts = prompts if raw else [tokenizer.render([Message("user", p)], True) for p in prompts]
    answers = generate_text(generator, tokenizer, texts, sampling, chosen.samples, chosen.seed)
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            continues = chosen.raw and not generator.reads_apart
            print(f"{prompt}{answer}" if continues else f"{prompt}\t{answer}")
    return 0


def chat(words: list[str]) -> int:
    """Talk to a model; the conversation is kept until end of input or an empty line starts a new one."""
    chosen = _parser("chat", "talk to a finished model; an empty line starts over, Ctrl-D ends").parse_args(words)
    model, sampling = _model(chosen.model), _sampling(chosen)
    kind = read_architecture(locate(model))[0]
    require(
        kind.encoder is None,
        f"chat does not take a model of architecture={kind.architecture}, which answers one text and keeps no "
        f'conversation; ask it by framework generate {chosen.model} "TEXT"',
    )
    generator, tokenizer = load_generator(model, GenerationConfig(slots=1), chosen.device)
    said: list[Message] = []
    while (line := _ask()) is not None:
        if not line:
            said = []
            continue
        said.append(Message("user", line))
        pieces = []
        prompt = tokenizer.render(said, True)
        for piece in stream_text(generator, tokenizer, prompt, sampling, chosen.seed + len(said)):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        said.append(Message("assistant", "".join(pieces)))
    return 0


def _ask() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None


def _model(folder: str) -> str:
    """A model folder, or a run folder that has one."""
    place = brought(folder)
    found = place / "model" if (place / "model/config.json").exists() else place
    if not any((found / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UsageError(f"{folder} holds no model (no config.json); name a run folder or its model/ folder")
    return str(found)


def _sampling(chosen: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(chosen.max_tokens, chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p)


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    parser = Words(f"framework {name}", description=text)
    parser.add_argument("model", help="a run folder or a Hugging Face folder")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return parser
