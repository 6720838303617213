"""Text that a tokenizer learns a second, in kB, beside the `tokenizers` library's own trainers on one core.

Tang verse and the project's English pages, repeated in new orders to the size asked for. BPE: ours reads, counts words
and hands them to the library; its own trainer reads the same lines. Unigram and WordPiece are learned here by
algorithms of our own, beside the library's, which learn other pieces of the same number: what they cost is compared,
not what they are worth.
"""

import functools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.train import train
from tests.benchmarks.contest import Laps, Run, compete, options, report
from tests.benchmarks.material import TANG

DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass(frozen=True)
class Task:
    """The same for all."""

    file: Path
    vocabulary: int

    def lines(self) -> Iterator[str]:
        with self.file.open(encoding="utf-8") as stream:
            yield from stream


def write_text(file: Path, kilobytes: int) -> None:
    """Lines of both languages, the same for equal sizes."""
    pages = [(TANG / "train.txt").read_text(encoding="utf-8"), *(p.read_text() for p in sorted(DOCS.glob("*.md")))]
    lines, order, size = [line for page in pages for line in page.splitlines() if line], random.Random(0), 0
    with file.open("w", encoding="utf-8") as stream:
        while size < 1000 * kilobytes:
            line = order.choice(lines) + "\n"
            stream.write(line)
            size += len(line.encode())


def ours(place: Path, laps: Laps, task: Task, kind: TokenizerKind) -> None:
    """What `framework tokenizer` does once its text is open."""
    config = TokenizerConfig(kind=kind, vocab_size=task.vocabulary)
    _learn(laps, task, lambda: train(task.lines(), config).vocab_size)


def library(place: Path, laps: Laps, task: Task, kind: TokenizerKind) -> None:
    """The library's trainer of that kind, with its usual way to cut words."""
    made = {
        TokenizerKind.BPE: (models.BPE(), pre_tokenizers.ByteLevel(), trainers.BpeTrainer),
        TokenizerKind.UNIGRAM: (models.Unigram(), pre_tokenizers.Metaspace(), trainers.UnigramTrainer),
        TokenizerKind.WORDPIECE: (models.WordPiece(), pre_tokenizers.BertPreTokenizer(), trainers.WordPieceTrainer),
    }

    def learned() -> int:
        model, cut, trainer = made[kind]
        learner = tokenizers.Tokenizer(model)
        learner.pre_tokenizer = cut
        learner.train_from_iterator(task.lines(), trainer(vocab_size=task.vocabulary, show_progress=False))
        return learner.get_vocab_size()

    _learn(laps, task, learned)


def _learn(laps: Laps, task: Task, learned: Callable[[], int]) -> None:
    size = task.file.stat().st_size // 1000
    laps.ready({"kB": size})
    while True:
        assert learned() <= task.vocabulary
        laps.done(size, 0)


def contestants(task: Task, kind: TokenizerKind) -> dict[str, Run]:
    """Ours first."""
    return {
        f"framework, {kind}": functools.partial(ours, task=task, kind=kind),
        f"tokenizers, {kind}": functools.partial(library, task=task, kind=kind),
    }


def main(argv: list[str] | None = None) -> None:
    """Run it, for every kind."""
    args = options(__doc__ or "", argv, rounds=3, kilobytes=10000, vocabulary=8000)
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        task = Task(Path(scratch) / "text.txt", args.vocabulary)
        write_text(task.file, args.kilobytes)
        for kind in (TokenizerKind.BPE, TokenizerKind.WORDPIECE, TokenizerKind.UNIGRAM):
            place = Path(scratch) / kind.value
            place.mkdir()
            contest = compete(contestants(task, kind), place, args.rounds)
            report(f"Learning a tokenizer, {kind}", contest, {"vocabulary": args.vocabulary}, args.out, unit="kB")


if __name__ == "__main__":
    main()
