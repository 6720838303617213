"""Extend a vocabulary: pieces learned from text are appended behind all old ids (`framework tokenizer extend`).

For every kind: each old token keeps its id, special and added ones included; new ids follow the largest old one; and a
text whose ids hold no new one has the ids that it had. Of byte-pair encoding, byte-level (GPT-2, Qwen, Llama 3) or with
byte fallback (Llama 2, `character`), more is true: put each new id's `sub_pieces` in its place, and every text has
exactly the ids that it had. For new merges stand behind all old ones, so the old ones are made first, as ever; and a
pair is never merged into a token that the old vocabulary has, for that would give an old id a new meaning. With Unigram
and WordPiece a new piece can move the borders of its neighbours, and `sub_pieces` are what the piece alone was spelled
by. No text that WordPiece could spell becomes unknown.

Left out: pieces that cross words (as the old pre-tokenizer cuts them, and where letters, digits and marks meet);
WordLevel and pairs without bytes, which cannot spell a new text.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import tokenizers

from framework.core.errors import DataError, UsageError
from framework.tokenization.config import ESCAPE
from framework.tokenization.load import HubTokenizer
from framework.tokenization.pairs import Symbols, learn_pairs
from framework.tokenization.pieces import CONTINUED, count_words, frequent_characters, learn_pieces, learn_word_pieces
from framework.tokenization.train import counted

_MIN_FREQUENCY = 2  # a piece or character seen less often is none
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
Model = dict[str, Any]  # the "model" of a tokenizer.json; what is appended is entered there
Pieces = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Extension:
    """The new tokenizer, and of each new id the old ids that spelled its text. Example: of GPT-2's vocabulary with 春
    appended as 50257, sub_pieces is {50257: (162, 246, 98)} (bytes E6 98 A5)."""

    tokenizer: HubTokenizer
    sub_pieces: Pieces


def extend(
    old: HubTokenizer, texts: Iterable[str], num_tokens: int, progress: Callable[[int], None] | None = None
) -> Extension:
    """Append at most `num_tokens` pieces learned from `texts`, read once. `progress` is told the characters read.

    DataError where the text holds nothing new; UsageError for a vocabulary of a kind that cannot be extended so.
    """
    state = json.loads(old.backend.to_str())
    model = state["model"]
    if model["type"] not in _KINDS:
        raise UsageError(f"a {model['type']} vocabulary cannot be extended; BPE, Unigram and WordPiece can")
    _settle(model, old.backend)
    pieces = _KINDS[model["type"]](old.backend, model, counted(texts, progress), old.vocab_size, num_tokens)
    if not pieces:
        raise DataError("the text holds no piece, seen twice, that the vocabulary lacks; give more text, or other")
    return Extension(old.on(tokenizers.Tokenizer.from_str(json.dumps(state))), pieces)


def _settle(model: Model, backend: tokenizers.Tokenizer) -> None:
    """Enter added tokens into the model's own vocabulary at their ids. The library does not read the ids of those that
    it finds only in `added_tokens`: it counts on from the model's size, and a larger model would move them."""
    vocab = model["vocab"]
    for index, token in sorted(backend.get_added_tokens_decoder().items()):
        if isinstance(vocab, dict):
            vocab.setdefault(token.content, index)
        elif index >= len(vocab):
            vocab.append([token.content, min(score for _, score in vocab)])


# --- byte-pair encoding --------------------------------------------------------------------------------------------


def _extend_pairs(
    backend: tokenizers.Tokenizer, model: Model, texts: Iterable[str], first: int, num_tokens: int
) -> Pieces:
    """New characters (of byte fallback) by frequency, then merges by frequency of what the old tokens leave apart.
    Without old merges a token is a character (`character`), and remains one."""
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise UsageError("BPE with marks for the inside or the end of words (GPT-1, CLIP) cannot be extended")
    if not model["byte_fallback"] and "ByteLevel" not in json.dumps(json.loads(backend.to_str())["decoder"]):
        raise UsageError("BPE without bytes behind it cannot be extended: byte-level and byte fallback can")
    spans = Counter[tuple[int | str, ...]]()
    for batch in _batches(texts):
        for text, encoding in zip(batch, backend.encode_batch(batch, add_special_tokens=False), strict=True):
            spans.update(_spans(text, encoding, backend, model["byte_fallback"]))
    pieces = _new_characters(spans, model, first, num_tokens)
    if model["merges"]:
        words = _known_only(spans, model["vocab"])
        _append_merges(learn_pairs(words, num_tokens - len(pieces), _MIN_FREQUENCY), model, pieces, first)
    return pieces


def _spans(
    text: str, encoding: tokenizers.Encoding, backend: tokenizers.Tokenizer, fallback: bool
) -> Iterator[tuple[int | str, ...]]:
    """Runs of old ids inside which a piece may be learned; a character that is spelled in bytes stands as itself."""
    added = backend.get_added_tokens_decoder()
    span: list[int | str] = []
    held = bytearray()  # fallback bytes of a character that is not yet whole
    last: tuple[int | None, str] | None = None  # the word and the character before
    for index, token, word, (start, end) in zip(
        encoding.ids, encoding.tokens, encoding.word_ids, encoding.offsets, strict=True
    ):
        here = text[start] if start < end else ""
        if last is not None and (word != last[0] or token.startswith("▁") or _meet(last[1], here)) and not held:
            yield tuple(span)
            span = []
        last = (word, text[end - 1] if start < end else "")
        byte = _BYTE.fullmatch(token) if fallback else None
        if index in added:
            yield tuple(span)
            span = []
        elif byte is None:
            span.append(index)
        else:
            held.append(int(byte[1], 16))
            if (character := _whole(held)) is not None:
                span.append(character)
                held.clear()
    yield tuple(span)


def _whole(content: bytearray) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _meet(left: str, right: str) -> bool:
    """Whether a letter, a digit or a mark ends here and another of the three begins. A space goes with what follows."""
    kinds = [unicodedata.category(c)[0].replace("M", "L") if c and not c.isspace() else "" for c in (left, right)]
    return "" not in kinds and (kinds[0] in "LN" or kinds[1] in "LN") and kinds[0] != kinds[1]


def _new_characters(spans: Counter[tuple[int | str, ...]], model: Model, first: int, at_most: int) -> Pieces:
    counts = Counter[str]()
    for span, count in spans.items():
        for symbol in span:
            if isinstance(symbol, str):
                counts[symbol] += count
    known, vocab = sorted(c for c in counts if counts[c] >= _MIN_FREQUENCY), model["vocab"]
    chosen = sorted(known, key=lambda c: -counts[c])[:at_most]
    pieces = {first + n: tuple(vocab[f"<0x{b:02X}>"] for b in c.encode()) for n, c in enumerate(chosen)}
    vocab |= {character: first + n for n, character in enumerate(chosen)}
    return pieces


def _known_only(spans: Counter[tuple[int | str, ...]], vocab: dict[str, int]) -> Counter[Symbols]:
    """The spans as ids, cut where a character has none."""
    words = Counter[Symbols]()
    for span, count in spans.items():
        for known, run in groupby(span, key=lambda symbol: isinstance(symbol, int) or symbol in vocab):
            if known:
                words[tuple(s if isinstance(s, int) else vocab[s] for s in run)] += count
    return words


def _append_merges(merges: Iterable[tuple[Symbols, Symbols]], model: Model, pieces: Pieces, first: int) -> None:
    """Enter merges and their tokens; one whose text is a token already, and those built upon it, are left out."""
    vocab = model["vocab"]
    token_of = {index: token for token, index in vocab.items()}
    made: dict[Symbols, int] = {}

    def known(part: Symbols) -> int | None:
        return part[0] if len(part) == 1 else made.get(part)

    for left, right in merges:
        a, b = known(left), known(right)
        if a is None or b is None or token_of[a] + token_of[b] in vocab:
            continue
        index = first + len(pieces)
        token_of[index] = token_of[a] + token_of[b]
        vocab[token_of[index]] = made[left + right] = index
        model["merges"].append([token_of[a], token_of[b]])
        pieces[index] = (*pieces.get(a, (a,)), *pieces.get(b, (b,)))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while batch := list(islice(rest, 256)):
        yield batch


# --- Unigram and WordPiece -----------------------------------------------------------------------------------------


def _extend_unigram(
    backend: tokenizers.Tokenizer, model: Model, texts: Iterable[str], first: int, num_tokens: int
) -> Pieces:
    """The likeliest pieces of a unigram model of the new text, where they are likelier than what spelled them before.
    No score is below the old lowest, from which the library reckons what is unknown."""
    vocab, bare = model["vocab"], tokenizers.Tokenizer(backend.model)
    score = dict(vocab)
    lowest = min(score.values())
    words = count_words(backend, texts)
    alphabet = frequent_characters(words, num_tokens)
    if not alphabet:
        return {}
    pieces: Pieces = {}
    for piece, its_score in learn_pieces(words, num_tokens + len(alphabet), alphabet):
        parts = bare.encode(piece)
        before = sum(score.get(token, lowest) for token in parts.tokens)
        if piece in score or ESCAPE in piece or max(its_score, lowest) <= before or len(pieces) == num_tokens:
            continue
        pieces[first + len(pieces)] = tuple(parts.ids)
        vocab.append([piece, max(its_score, lowest)])
    return pieces


def _extend_word_pieces(
    backend: tokenizers.Tokenizer, model: Model, texts: Iterable[str], first: int, num_tokens: int
) -> Pieces:
    """First, where they lack, the characters that the old pieces hold, as continuations: a longer first piece must
    never leave a rest that cannot be spelled. Then pieces as training learns them."""
    vocab, prefix = model["vocab"], model["continuing_subword_prefix"]
    old = dict(vocab)
    inside = {c for piece in old for c in (piece.removeprefix(prefix) if piece.startswith(prefix) else piece[1:])}
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    inside -= {c for token in added | {model["unk_token"]} for c in token}
    lacking = sorted(prefix + c for c in inside if prefix + c not in old)
    if len(lacking) >= num_tokens:
        raise UsageError(
            f"tokenizer.new_tokens={num_tokens} must be more than {len(lacking)}: so many characters of old pieces "
            "need a piece that continues a word, lest words become unknown"
        )
    learned = (
        p.replace(CONTINUED, prefix, 1) for p in learn_word_pieces(count_words(backend, texts), num_tokens + len(old))
    )
    new = list(dict.fromkeys(p for p in [*lacking, *learned] if p not in old))[:num_tokens]
    vocab |= {piece: first + n for n, piece in enumerate(new)}
    return {first + n: _longest_first(piece, old, prefix, model["unk_token"]) for n, piece in enumerate(new)}


def _longest_first(piece: str, vocab: dict[str, int], prefix: str, unknown: str) -> tuple[int, ...]:
    """The ids that spelled a piece: always the longest that fits; one [UNK] where none does."""
    ids: list[int] = []
    mark, rest = (prefix, piece.removeprefix(prefix)) if piece.startswith(prefix) else ("", piece)
    while rest:
        size = next((n for n in range(len(rest), 0, -1) if mark + rest[:n] in vocab), 0)
        if size == 0:
            return (vocab[unknown],)
        ids.append(vocab[mark + rest[:size]])
        mark, rest = prefix, rest[size:]
    return tuple(ids)


_KINDS = {"BPE": _extend_pairs, "Unigram": _extend_unigram, "WordPiece": _extend_word_pieces}
