"""`framework data check|prepare|stats`: data looked at, counted and prepared before any training.

Left out: changing data (curation), and what a sample becomes in a stage (`framework.data`).
"""

import argparse
import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import util

from rich.table import Table

from framework.core.config import find_file
from framework.core.errors import DataError, UsageError, nearest
from framework.core.records import (
    ClassifiedSample,
    ConversationSample,
    LabelledSample,
    Message,
    PreferenceSample,
    PromptSample,
    Sample,
    TextSample,
    Tokenizer,
)
from framework.curation.language import language
from framework.data import classify, preference, pretrain, prompts, sft
from framework.data.sources import Report, Source, described, open_sources, read_located
from framework.stages.assessment import open_prompts
from framework.stages.config import ClassifyRun, PpoRun, RunConfig, TrainingRun
from framework.stages.extensions import load_extensions
from framework.stages.job import located
from framework.stages.training import open_both
from framework.stages.words import Words
from framework.tokenization.load import load as load_tokenizer
from framework.tracking.console import console
from framework.tracking.progress import Progress

Compose = Callable[[str, Sequence[str]], tuple[RunConfig, ...]]
_ROWS = {
    "pretrain": pretrain.open_rows,
    "sft": sft.open_rows,
    "reward_model": preference.open_rows,
    "preference": preference.open_rows,
}
_BAR = 40  # characters of the longest bar


def data(words: list[str], compose: Compose) -> int:
    """One of the three; returns 1 where `check` found something bad."""
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb == "prepare":
        return prepare(rest, compose)
    if verb in ("check", "stats"):
        return check(rest) if verb == "check" else stats(rest)
    raise UsageError(f"{verb or 'a verb is missing'}: {nearest(verb, ['check', 'prepare', 'stats'])}")


# --- check ---------------------------------------------------------------------------------------------------------


def check(words: list[str]) -> int:
    """Read everything; name every bad record by file and line; count."""
    chosen = _parser("check", "read data and name every record that cannot be used").parse_args(words)
    errors: list[DataError] = []

    def report(error: DataError) -> None:
        errors.append(error)
        print(error)

    samples = files = 0
    for source in open_sources([find_file(path) for path in chosen.path], chosen.format, report):
        before, good = len(errors), _num_samples(source, report)
        print(f"{source.path}: format {source.format}, {good:,} samples, {len(errors) - before:,} bad records")
        samples, files = samples + good, files + 1
    print(f"{files:,} files, {samples:,} samples, {len(errors):,} errors")
    return int(bool(errors))


def _num_samples(source: Source, report: Report) -> int:
    """How many samples a file gives, bad records reported; one that cannot be read to its end is reported too."""
    samples = 0
    try:
        for _ in read_located([source], report):
            samples += 1
    except DataError as error:
        report(error)
    return samples


# --- prepare -------------------------------------------------------------------------------------------------------


def prepare(words: list[str], compose: Compose) -> int:
    """Make a stage's shards ahead: the stage's own words, the same cache, nothing else started."""
    if not words:
        raise UsageError(
            "data prepare takes the words of a stage: framework data prepare sft init_from=... data.train=..."
        )
    (config, *members) = compose(words[0], words[1:])
    if members or not isinstance(config, TrainingRun | PpoRun):
        raise UsageError(f"data prepare {words[0]}: {nearest(words[0], [*_ROWS, 'classify', 'ppo'])}")
    load_extensions(config.extensions)
    if isinstance(config, PpoRun):
        open_prompts(_Terminal(), config, load_tokenizer(config.init_from), prompts.open_rows)
    elif isinstance(config, ClassifyRun):
        targets = classify.read_targets(located(config.data), config.classify)
        open_both(_Terminal(), config, partial(classify.open_rows, targets, 0), load_tokenizer(config.init_from))
    else:
        open_both(_Terminal(), config, _ROWS[config.stage], load_tokenizer(config.init_from or config.tokenizer))
    print(f"prepared under {config.data.cache or config.prepared}; {words[0]} finds it there")
    return 0


class _Terminal:
    """What is told without a run."""

    def say(self, line: str) -> None:
        print(line)

    @contextlib.contextmanager
    def preparing(self, part: str) -> Iterator[Callable[[int, int], None]]:
        with Progress(f"preparing {part} data", unit="bytes") as progress:
            yield lambda done, _: progress(done)


# --- stats ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What was counted of one source in one language."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0


@dataclass
class Census:
    """Counts by (path, language), and how many documents have a length in [2^(n-1), 2^n)."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    lengths: Counter[int] = field(default_factory=Counter)


def stats(words: list[str]) -> int:
    """Documents, characters and tokens by source and language, and the histogram of lengths."""
    parser = _parser("stats", "count documents, characters and tokens by source and language")
    parser.add_argument("--tokenizer", default="", help="a model's or tokenizer's folder: count tokens too")
    chosen = parser.parse_args(words)
    tokenizer = load_tokenizer(chosen.tokenizer) if chosen.tokenizer else None
    census = Census()
    for path in chosen.path:
        sources = open_sources([find_file(path)], chosen.format)
        print(f"{path}: {described(sources)}")
        for texts in _batches(sources):
            _count(census, path, texts, tokenizer)
    _show(census, tokenizer is not None)
    return 0


def _batches(sources: list[Source], size: int = 256) -> Iterator[list[str]]:
    batch: list[str] = []
    for found in read_located(sources):
        batch.append(text_of(found.sample))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def text_of(sample: Sample) -> str:
    """All that a sample says, turn by turn; of pairs the prompt and both answers. Templates add nothing here."""
    if isinstance(sample, TextSample):
        return sample.text
    if isinstance(sample, ConversationSample):
        return _said(sample.messages)
    if isinstance(sample, ClassifiedSample):
        return "\n".join(filter(None, (sample.text, sample.pair)))
    answers = {
        PreferenceSample: lambda s: [s.chosen, s.rejected],
        LabelledSample: lambda s: [s.answer],
        PromptSample: lambda s: [s.answer or ""],
    }[type(sample)](sample)
    return "\n".join(filter(None, [_said(sample.prompt), *answers]))


def _said(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages)


def _count(census: Census, path: str, texts: list[str], tokenizer: Tokenizer | None) -> None:
    tokens = list(map(len, tokenizer.encode_many(texts))) if tokenizer else [0] * len(texts)
    for text, num_tokens in zip(texts, tokens):
        tally = census.tallies[path, language(text) if _KNOWS_LANGUAGES else ""]
        tally.documents += 1
        tally.characters += len(text)
        tally.tokens += num_tokens
        census.lengths[(num_tokens if tokenizer else len(text)).bit_length()] += 1


_KNOWS_LANGUAGES = util.find_spec("py3langid") is not None


def _show(census: Census, with_tokens: bool) -> None:
    columns = ["source", "language", "documents", "characters", "tokens"]
    table = Table(*columns if with_tokens else columns[:-1])
    for (path, code), tally in sorted(census.tallies.items()):
        counts = [tally.documents, tally.characters, *([tally.tokens] if with_tokens else [])]
        table.add_row(path, code, *(f"{count:,}" for count in counts))
    console().print(table)
    if not _KNOWS_LANGUAGES:
        print('languages are not told apart: pip install "framework[curation]"')
    print(f"length of a document in {'tokens' if with_tokens else 'characters'}")
    most = max(census.lengths.values(), default=1)
    for n in range(min(census.lengths, default=0), max(census.lengths, default=-1) + 1):
        count = census.lengths[n]
        print(f"{(1 << n) >> 1:>9,} to {(1 << n) - 1:>9,}  {count:>11,}  {'█' * round(_BAR * count / most)}")


def _parser(verb: str, text: str) -> argparse.ArgumentParser:
    parser = Words(f"framework data {verb}", description=text)
    parser.add_argument("path", nargs="+", help="files, folders, FOLDER/NAME of a dataset_info.json, hub:OWNER/NAME")
    parser.add_argument("--format", default="auto", help="a data format by name, instead of recognising it")
    return parser
