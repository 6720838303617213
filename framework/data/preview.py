"""One sample as a reader sees it: what is trained stands between « and »; half a character at its end is left out."""

import codecs
from collections.abc import Iterable
from itertools import groupby

from framework.core.records import Tokenizer


def marked(tokenizer: Tokenizer, ids: Iterable[int], mask: Iterable[bool]) -> str:
    """The text of `ids` with special tokens spelt out and trained stretches marked: `<|user|>hi<|end|>«yo<|end|>»`."""
    parts = []
    for trained, run in groupby(zip(ids, mask), key=lambda pair: bool(pair[1])):
        text = _spelt(tokenizer, [int(token) for token, _ in run])
        parts.append(f"«{text}»" if trained else text)
    return "".join(parts)


def _spelt(tokenizer: Tokenizer, ids: list[int]) -> str:
    runs = groupby(ids, key=lambda token: tokenizer.token_bytes(token) == b"")
    return "".join(
        "".join(map(tokenizer.token_text, run)) if special else _plain(tokenizer, run) for special, run in runs
    )


def _plain(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    content = b"".join(map(tokenizer.token_bytes, ids))
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(content)
