"""What the data tests share: a small character tokenizer, and a way to write records."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from framework.core.records import Tokenizer
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.train import train

Write = Callable[[str, Sequence[Any]], str]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Five special tokens, 256 bytes, and the letters a to z in alphabetical order from id 261 on."""
    letters = "".join(chr(ord("a") + n) * (26 - n) for n in range(26))
    return train(iter([letters]), TokenizerConfig(kind=TokenizerKind.CHARACTER, vocab_size=5 + 256 + 26))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write records as JSON lines, or lines as text; the path."""

    def write(name: str, records: Sequence[Any]) -> str:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write
