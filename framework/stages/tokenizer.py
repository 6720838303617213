"""The tokenizer stage: text in, a Hugging Face tokenizer folder out."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from framework.core.errors import DataError
from framework.core.records import Sample, TextSample
from framework.data.config import DataConfig
from framework.data.sources import open_sources, read, read_located
from framework.stages.config import TokenizerRun
from framework.stages.job import Run, located, open_job
from framework.tokenization.train import train
from framework.tracking.progress import Progress


def run(config: TokenizerRun) -> Run:
    """Learn a vocabulary from data.train and say how far it compresses data.valid."""
    with open_job(config) as job:
        if job.finished:
            return job.result()
        data = located(config.data, job.say)
        with Progress("reading texts", _num_bytes(data), "bytes", enabled=config.tracking.progress) as progress:
            texts = _told(data, progress)
            learned = train(texts, config.tokenizer, lambda _: job.stop.leave("while reading texts"))
        learned.save(str(config.folder / "model"))
        held_out = list(_texts(data.valid_paths or data.train, data.format))
        num_bytes = sum(len(text.encode()) for text in held_out)
        num_tokens = sum(map(len, learned.encode_many(held_out)))
        figures = {"vocab_size": learned.vocab_size, "bytes_per_token": num_bytes / max(1, num_tokens)}
        job.learned(f"bytes a token ({learned.vocab_size:,} tokens)", figures["bytes_per_token"], 1.0)
        return job.finish(figures)


def _told(data: DataConfig, progress: Progress) -> Iterator[str]:
    """The texts to learn from; `progress` hears how many bytes of their files are read."""
    sources = open_sources(data.train, data.format)
    before = [0, *itertools.accumulate(Path(source.path).stat().st_size for source in sources)]
    for found in read_located(sources):
        yield from _text_of(found.sample, found.path)
        progress(before[found.file] + found.offset)


def _num_bytes(data: DataConfig) -> int:
    return sum(Path(source.path).stat().st_size for source in open_sources(data.train, data.format))


def _texts(paths: list[str], format: str) -> Iterator[str]:
    for path in paths:
        for sample in read(path, format):
            yield from _text_of(sample, path)


def _text_of(sample: Sample, path: str) -> list[str]:
    if isinstance(sample, TextSample):
        return [sample.text]
    if hasattr(sample, "messages"):
        return [message.content for message in sample.messages]
    raise DataError("a tokenizer learns from texts or conversations, not from pairs or prompts", path)
