"""The tokenizer stage: text in, a Hugging Face tokenizer folder out, learned from nothing or extending another's.

Where what is extended is a model's folder, the model is written too, with rows for the new tokens (`growth`).
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from framework.core.errors import DataError
from framework.core.records import ClassifiedSample, Sample, TextSample
from framework.data.config import DataConfig
from framework.data.sources import open_sources, read, read_located
from framework.stages.config import TokenizerRun
from framework.stages.growth import grow
from framework.stages.job import Job, Run, located, open_job
from framework.tokenization.extend import Pieces, extend
from framework.tokenization.load import HubTokenizer, load
from framework.tokenization.train import train
from framework.tracking.atomic import replace_json
from framework.tracking.progress import Progress


def run(config: TokenizerRun) -> Run:
    """Learn a vocabulary from data.train and say how far it compresses data.valid, an extended one before and after."""
    with open_job(config, parents={"init_from": config.init_from}) as job:
        if job.finished:
            return job.result()
        data = located(config.data, job.say)
        old = load(config.init_from) if config.init_from else None
        learned, sub_pieces = _learned(job, config, data, old)
        learned.save(str(config.folder / "model"))
        if sub_pieces:
            replace_json(config.folder / "sub_pieces.json", {str(i): parts for i, parts in sub_pieces.items()})
            job.say(grow(config.init_from, config.folder / "model", learned, sub_pieces))
        held_out = list(_texts(data.valid_paths or data.train, data.format))
        figures = {"vocab_size": learned.vocab_size, "bytes_per_token": _bytes_per_token(learned, held_out)}
        before = 1.0 if old is None else _bytes_per_token(old, held_out)
        job.learned(f"bytes a token ({learned.vocab_size:,} tokens)", figures["bytes_per_token"], before)
        if old is not None:
            figures |= {"bytes_per_token/before": before, "new_tokens": learned.vocab_size - old.vocab_size}
        return job.finish(figures)


def _learned(job: Job, config: TokenizerRun, data: DataConfig, old: HubTokenizer | None) -> tuple[HubTokenizer, Pieces]:
    def pause(_: int) -> None:
        job.stop.leave("while reading texts")

    with Progress("reading texts", _num_bytes(data), "bytes", enabled=config.tracking.progress) as progress:
        texts = _told(data, progress)
        if old is None:
            return train(texts, config.tokenizer, pause), {}
        extension = extend(old, texts, config.tokenizer.new_tokens, pause)
    return extension.tokenizer, extension.sub_pieces


def _bytes_per_token(tokenizer: HubTokenizer, texts: list[str]) -> float:
    num_bytes = sum(len(text.encode()) for text in texts)
    return num_bytes / max(1, sum(map(len, tokenizer.encode_many(texts))))


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
    if isinstance(sample, ClassifiedSample):
        return list(filter(None, (sample.text, sample.pair)))
    if hasattr(sample, "messages"):
        return [message.content for message in sample.messages]
    raise DataError("a tokenizer learns from texts or conversations, not from pairs or prompts", path)
