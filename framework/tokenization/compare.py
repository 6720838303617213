"""How a tokenizer spells a text: what it needs for a character, how often it falls back to bytes, what does not return.

Left out: how good a model becomes with it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import tokenizers

from framework.tokenization.vocabulary import all_token_bytes

# Ideographs: the unified ones with all extensions, the compatibility ones, and the zero.
_CHINESE = re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class Tally:
    """What was counted of some lines. Example: the line "床前a" whose 床 is spelled as three bytes and 前a as a token
    gives lines 1, characters 3, bytes 7, tokens 4, chinese 2, chinese_tokens 3.5, fallback 3.

    A token belongs in equal parts to the characters that it spells, so 前 needs half a token. `fallback` counts tokens
    that are no whole characters, or the byte that stands for one that no piece spells. `unknown` counts the tokens that
    say only that something was there. `failures` are lines whose ids do not decode to the line.
    """

    lines: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    chinese: int = 0
    chinese_tokens: float = 0.0
    fallback: int = 0
    unknown: int = 0
    failures: int = 0


class Spelling:
    """One tokenizer's tally, line by line."""

    def __init__(self, backend: tokenizers.Tokenizer):
        """`backend` keeps its ways but for truncation and padding."""
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.tally = backend, Tally()
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._fallback = _fallback_ids(backend)
        self._unknown = _unknown_id(backend)

    def count(self, lines: list[str]) -> None:
        """Add some lines. Special tokens that a line spells count as what they are; none are added."""
        for line, encoding in zip(lines, self.backend.encode_batch(lines, add_special_tokens=False), strict=True):
            tally, ids = self.tally, encoding.ids
            tally.lines += 1
            tally.characters += len(line)
            tally.bytes += len(line.encode())
            tally.tokens += len(ids)
            tally.fallback += sum(i in self._fallback for i in ids)
            tally.unknown += sum(i == self._unknown for i in ids)
            tally.failures += self.backend.decode(ids, skip_special_tokens=False) != line
            _count_chinese(tally, line, encoding.offsets)


def _count_chinese(tally: Tally, line: str, spans: Iterable[tuple[int, int]]) -> None:
    before = [0, *accumulate(_CHINESE.match(character) is not None for character in line)]
    tally.chinese += before[-1]
    tally.chinese_tokens += sum((before[end] - before[start]) / (end - start) for start, end in spans if end > start)


def _fallback_ids(backend: tokenizers.Tokenizer) -> set[int]:
    added = backend.get_added_tokens_decoder()
    vocab = backend.get_vocab(with_added_tokens=True)
    table = all_token_bytes(backend, max(vocab.values(), default=-1) + 1)
    by_name = json.loads(backend.to_str())["model"].get("byte_fallback", False)
    return {
        index
        for token, index in vocab.items()
        if index not in added and ((by_name and _BYTE.fullmatch(token)) or not _is_text(table[index]))
    }


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unknown_id(backend: tokenizers.Tokenizer) -> int | None:
    """The id of the model's own unknown token; where bytes stand behind it, it never comes out."""
    model = json.loads(backend.to_str())["model"]
    if model.get("byte_fallback"):
        return None
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else backend.token_to_id(token)
