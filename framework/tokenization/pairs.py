"""Byte-pair learning over any symbols (Sennrich et al. 2016, algorithm 1): characters, bytes, or another vocabulary's
tokens. The `tokenizers` library does it, on words in which each symbol is one private character.

It serves what the library's own trainers cannot do: go on from a vocabulary (`extend`), and learn WordPiece the same
way twice. Left out: how text becomes symbols.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from framework.core.errors import UsageError

Symbols = tuple[int, ...]
_FIRST = 0x10000  # the first code point used; above it there are 2**20, and none is a space
_MOST = 0x10FFFF - _FIRST + 1
_CHUNK = 1 << 16  # characters handed over at once


def learn_pairs(words: Mapping[Symbols, int], num_pairs: int, min_frequency: int = 2) -> list[tuple[Symbols, Symbols]]:
    """At most `num_pairs` merges (left, right), the most frequent adjacent pair first, each counted after those before
    it were made; a pair seen less than `min_frequency` times is none. Equal words, equal merges.

    `words` are sequences of symbols from 0 to 2**20 - 1 with their counts. A side of a merge is the sequence of the
    symbols that it was merged from. Example: {(0, 0, 1): 3} gives [((0,), (0,)), ((0, 0), (1,))].
    """
    alphabet = {symbol for word in words for symbol in word}
    if not alphabet or num_pairs < 1:
        return []
    if max(alphabet) >= _MOST:
        raise UsageError(f"a vocabulary of {max(alphabet):,} tokens; pairs are learned of at most {_MOST:,}")
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = len(alphabet) + num_pairs
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=min_frequency, show_progress=False)
    learner.train_from_iterator(_spelled(words), trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(_symbols(left), _symbols(right)) for left, right in merges]


def _spelled(words: Mapping[Symbols, int]) -> Iterator[str]:
    """Each word as often as it was counted, separated by spaces."""
    for word, count in words.items():
        text = _text(word) + " "
        at_once = max(1, _CHUNK // len(text))
        for start in range(0, count, at_once):
            yield text * min(at_once, count - start)


def _text(symbols: Sequence[int]) -> str:
    return "".join(chr(_FIRST + symbol) for symbol in symbols)


def _symbols(text: str) -> Symbols:
    return tuple(ord(character) - _FIRST for character in text)
