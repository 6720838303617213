"""What Unigram and WordPiece learn from counted words: pieces. Training and extending call the same functions.

Left out: how text becomes words, which is the tokenizer's own normaliser and pre-tokenizer.
"""

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from framework.tokenization.pairs import Symbols, learn_pairs

CONTINUED = "##"  # WordPiece: in front of a piece that does not begin its word
_COVERAGE = 0.9995  # of all characters of a text are spelled by pieces, the rarest by bytes; SentencePiece's default


def count_words(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Words as the backend's normaliser and pre-tokenizer cut them, with their counts."""
    normal, cut = backend.normalizer, backend.pre_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        text = text if normal is None else normal.normalize_str(text)
        counts.update([text] if cut is None else (word for word, _ in cut.pre_tokenize_str(text)))
    return counts


def count_characters(words: Counter[str]) -> Counter[str]:
    """How often each character stands in all words."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return counts


def frequent_characters(words: Counter[str], at_most: int) -> list[str]:
    """The most frequent characters, until they cover 99.95% of the text; ties by code point."""
    counts = count_characters(words)
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    covered = itertools.accumulate(counts[c] for c in ranked)
    enough = next((n for n, total in enumerate(covered, 1) if total >= _COVERAGE * counts.total()), 0)
    return ranked[: min(enough, at_most)]


def learn_pieces(words: Counter[str], size: int, alphabet: Collection[str]) -> list[tuple[str, float]]:
    """At most `size` pieces with their log-probabilities in a unigram language model (Kudo 2018), the likeliest first.

    Every character of `alphabet` is among them; words are cut where another character stands. Equal words, equal
    pieces: the library's sums may differ in the last bits from run to run, so scores are rounded to six decimals.
    """
    learner = tokenizers.Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    trainer = trainers.UnigramTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    learner.train_from_iterator(_lines(words, frozenset(alphabet)), trainer)
    return _ranked(json.loads(learner.to_str())["model"]["vocab"])[:size]


def _lines(words: Counter[str], alphabet: frozenset[str]) -> Iterator[str]:
    """Each word on a line of its own as often as it was counted; line ends that are words themselves are no lines."""
    for word, count in words.items():
        kept = "".join(c if c in alphabet and c != "\n" else "\n" for c in word).strip("\n")
        if kept:
            yield from itertools.repeat(kept, count)


def _ranked(vocab: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Pieces by score. The library gives characters that it had pruned the lowest scores, 1e-4 apart in the order of
    a hash: here they have the lowest."""
    lowest = min(score for _, score in vocab)
    ladder = lowest + 1e-4 * sum(len(piece) == 1 for piece, _ in vocab)
    scored = [(p, round(lowest if len(p) == 1 and score <= ladder else score, 6)) for p, score in vocab]
    return sorted(scored, key=lambda entry: (-entry[1], entry[0]))


def learn_word_pieces(words: Counter[str], size: int) -> list[str]:
    """At most `size` WordPiece pieces: characters by frequency, both as a word's first and as its continuation, and
    half of `size` at most; then merges, the most frequent pair first."""
    symbols: Counter[tuple[str, bool]] = Counter()
    for word, count in words.items():
        for place, character in enumerate(word):
            symbols[character, place > 0] += count
    ranked = sorted(symbols, key=lambda s: (-symbols[s], s))[: max(1, size // 2)]
    index = {symbol: number for number, symbol in enumerate(ranked)}
    spelled: Counter[Symbols] = Counter()
    for word, count in words.items():
        numbers = [index.get((character, place > 0), -1) for place, character in enumerate(word)]
        if -1 not in numbers:
            spelled[tuple(numbers)] += count
    merges = learn_pairs(spelled, size - len(ranked))

    def piece(sequence: Symbols) -> str:
        return CONTINUED * ranked[sequence[0]][1] + "".join(ranked[number][0] for number in sequence)

    return [piece(sequence) for sequence in [*((n,) for n in range(len(ranked))), *(a + b for a, b in merges)]]
