"""What is counted of a text: by hand, for a tokenizer of each kind, and against counts made without the library."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from framework.tokenization.compare import Spelling, Tally
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.train import train

BYTES = [f"<0x{b:02X}>" for b in range(256)]


def byte_fallback() -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate([*BYTES, "a", "前", "前a"])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("前", "a")], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def test_by_hand() -> None:
    spelling = Spelling(byte_fallback())
    spelling.count(["床前a"])
    assert spelling.tally == Tally(1, 3, 7, 4, chinese=2, chinese_tokens=3.5, fallback=3, unknown=0, failures=0)
    spelling.count(["", "a\n"])
    assert spelling.tally == Tally(3, 5, 9, 6, chinese=2, chinese_tokens=3.5, fallback=4, unknown=0, failures=0)
    assert spelling.vocab_size == 259


def test_byte_level_tokens_that_are_no_whole_characters_are_fallback() -> None:
    """GPT-2's spelling of 春 (E6 98 A5) by two merged bytes and one: both are parts. A space and é are characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "æĺ", "Ã©"])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("æ", "ĺ"), ("Ã", "©")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.enable_truncation(2)
    spelling = Spelling(made)
    spelling.count(["春 é"])
    assert spelling.tally == Tally(1, 3, 6, 4, chinese=1, chinese_tokens=2, fallback=2, unknown=0, failures=0)


def test_unknown_words_and_lost_spaces_are_counted() -> None:
    made = tokenizers.Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    spelling = Spelling(made)
    spelling.count(["ab a", "a  ab", "x"])
    assert spelling.tally == Tally(3, 10, 10, 7, unknown=1, failures=2)


@pytest.mark.parametrize("kind", list(TokenizerKind), ids=str)
def test_counts_are_those_of_the_tokens(kind: TokenizerKind) -> None:
    """Chinese text alone: its characters need all tokens; every line comes back, of WordPiece too."""
    texts = ["床前明月光", "疑是地上霜", "舉頭望明月", "低頭思故鄉"]
    tokenizer = train(iter(texts), TokenizerConfig(kind=kind, vocab_size=320))
    spelling = Spelling(tokenizer._backend)
    spelling.count(texts)
    ids = tokenizer.encode_many(texts)
    assert spelling.tally.tokens == sum(map(len, ids))
    assert spelling.tally.chinese == 20
    assert spelling.tally.chinese_tokens == pytest.approx(spelling.tally.tokens)
    assert spelling.tally.failures == 0
    parts = [tokenizer.token_bytes(i) for row in ids for i in row]
    assert spelling.tally.fallback == sum(part.decode(errors="replace").count("\ufffd") > 0 for part in parts)
