"""`framework tokenizer compare FOLDER... --file FILE`: how several tokenizers spell one text, a row each; and how many
characters a second a model would write with each of them.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from framework.core.config import find_file
from framework.data.sources import Source, open_sources, read_located
from framework.generation.config import GenerationConfig, SamplingConfig
from framework.stages.data import text_of
from framework.stages.words import Words
from framework.tokenization.compare import Spelling, Tally
from framework.tokenization.load import read_backend
from framework.tracking.console import console
from framework.tracking.progress import Progress

_COLUMNS = (
    "tokenizer",
    "vocabulary",
    "tokens/character",
    "tokens/Chinese character",
    "bytes/token",
    "byte fallback",
    "unknown",
    "round-trip failures",
)
_BATCH = 256  # lines encoded at once
_TIMED = 64  # tokens


def compare(words: list[str]) -> int:
    """Print the table. A line of a .txt is a line; of other data, all that a record says."""
    parser = Words("framework tokenizer compare", description="how tokenizers spell a text, a row each")
    parser.add_argument("folder", nargs="+", help="Hugging Face folders with a tokenizer.json: models', tokenizers'")
    parser.add_argument("--file", required=True, help="the text: .txt, .jsonl, .json or .parquet, in UTF-8")
    parser.add_argument("--model", default="", help="a folder: also the characters a second that it would write")
    chosen = parser.parse_args(words)
    spellings = [Spelling(read_backend(_model(folder))) for folder in chosen.folder]
    path = find_file(chosen.file)
    sources = open_sources([path], "lines" if Path(path).suffix == ".txt" else "auto")
    for batch in _batches(sources):
        for spelling in spellings:
            spelling.count(batch)
    table = Table(*_COLUMNS[:1])
    for column in _COLUMNS[1:]:
        table.add_column(column, justify="right")
    for folder, spelling in zip(chosen.folder, spellings, strict=True):
        table.add_row(folder, f"{spelling.vocab_size:,}", *_cells(spelling.tally))
    console().print(table)
    first = spellings[0].tally
    print(f"{chosen.file}: {first.lines:,} lines, {first.characters:,} characters, {first.chinese:,} of them Chinese")
    if chosen.model:
        speed = _tokens_a_second(chosen.model)
        print(f"{chosen.model} writes {speed:,.1f} tokens a second here, one answer at a time; in characters:")
        for folder, spelling in zip(chosen.folder, spellings, strict=True):
            print(f"  {speed * spelling.tally.characters / max(1, spelling.tally.tokens):,.1f} a second with {folder}")
    return 0


def _tokens_a_second(folder: str) -> float:
    """Of a model's answers to nothing, drawn until there are enough of them; the first tokens are not timed."""
    from framework.generation.text import load_generator  # torch

    generator, tokenizer = load_generator(folder, GenerationConfig(slots=1))
    sampling = SamplingConfig(max_tokens=min(_TIMED, generator.config.max_positions - 1))
    drawn, seconds, answers = 0, 0.0, itertools.count()
    while drawn < _TIMED:
        tokens = generator.stream([tokenizer.end_id], sampling, seed=next(answers))
        next(tokens, None)
        began = time.perf_counter()
        told = sum(1 for _ in tokens)
        drawn += max(1, min(told + 1, sampling.max_tokens - 1))  # an end token is drawn and not told
        seconds += time.perf_counter() - began
    return drawn / seconds


def _model(folder: str) -> str:
    """A folder with a tokenizer.json, or a run folder that has one in its model/."""
    inside = Path(folder, "model")
    return str(inside) if (inside / "tokenizer.json").is_file() else folder


def _batches(sources: list[Source]) -> Iterator[list[str]]:
    batch: list[str] = []
    before = [0, *itertools.accumulate(Path(source.path).stat().st_size for source in sources)]
    with Progress("comparing", before[-1], "bytes") as progress:
        for found in read_located(sources):
            batch.append(text_of(found.sample))
            if len(batch) == _BATCH:
                yield batch
                batch = []
                progress(before[found.file] + found.offset)
        yield batch
        progress(before[-1])


def _cells(tally: Tally) -> list[str]:
    return [
        _ratio(tally.tokens, tally.characters),
        _ratio(tally.chinese_tokens, tally.chinese),
        _ratio(tally.bytes, tally.tokens),
        f"{tally.fallback / max(1, tally.tokens):.2%}",
        f"{tally.unknown / max(1, tally.tokens):.2%}",
        f"{tally.failures:,} of {tally.lines:,}",
    ]


def _ratio(part: float, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"
