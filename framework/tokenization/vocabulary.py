"""Which bytes a token stands for, read from the decoder that `tokenizer.json` names.

It serves streaming: whoever prints tokens as they come must hold back an unfinished UTF-8 character.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

Pattern = tuple[re.Pattern[str], str]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def all_token_bytes(backend: tokenizers.Tokenizer, size: int) -> list[bytes]:
    """Entry i: the bytes that id i adds to a text. Special tokens and unused ids add none."""
    added = backend.get_added_tokens_decoder()
    of = _reader(_decoder_steps(backend))
    table = [b""] * size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index not in added:
            table[index] = of(token)
        elif not added[index].special:
            table[index] = token.encode()
    return table


def byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: character -> byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    decoder = json.loads(backend.to_str()).get("decoder")
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _reader(steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return functools.partial(_byte_level, byte_characters())
    if "WordPiece" in kinds:
        prefix = next(step["prefix"] for step in steps if step["type"] == "WordPiece")
        return functools.partial(_word_piece, prefix, list(_patterns(steps)))
    if not kinds:
        return lambda token: b" " + token.encode()  # without a decoder the library joins tokens by spaces
    space = next((step["replacement"] for step in steps if step["type"] == "Metaspace"), None)
    patterns = list(_patterns(steps))
    if space is not None:
        patterns.append((re.compile(re.escape(space)), " "))
    return functools.partial(_fallback if "ByteFallback" in kinds else _plain, patterns)


def _patterns(steps: list[dict[str, Any]]) -> Iterator[Pattern]:
    """What the decoder's steps replace, token by token; Python's regular expressions stand in for the library's."""
    for step in steps:
        if step["type"] == "Replace":
            ((kind, pattern),) = step["pattern"].items()
            yield re.compile(pattern if kind == "Regex" else re.escape(pattern)), step["content"]


def _word_piece(prefix: str, patterns: list[Pattern], token: str) -> bytes:
    return _plain(patterns, token.removeprefix(prefix) if token.startswith(prefix) else f" {token}")


def _byte_level(bytes_of: dict[str, int], token: str) -> bytes:
    known = [bytes_of.get(character) for character in token]
    return token.encode() if None in known else bytes(known)  # type: ignore[arg-type]


def _fallback(patterns: list[Pattern], token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _plain(patterns, token)


def _plain(patterns: list[Pattern], token: str) -> bytes:
    for old, new in patterns:
        token = old.sub(lambda _: new, token)  # noqa: B023  (called at once)
    return token.encode()
