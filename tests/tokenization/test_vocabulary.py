"""The bytes of tokens, joined, are the text: for every kind of decoder that published tokenizers have."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from framework.tokenization.vocabulary import all_token_bytes, byte_characters

BYTES = {f"<0x{b:02X}>": b for b in range(256)}


def sentencepiece_like() -> tokenizers.Tokenizer:
    """As Llama 2: spaces are ▁, one in front of the text, bytes behind."""
    vocab = {**BYTES, "▁": 256, "a": 257, "b": 258, "▁a": 259}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def metaspace() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0), ("▁", -2.0)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def word_piece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    return made


def words() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "ab": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.mark.parametrize(
    ("made", "text"),
    [(sentencepiece_like(), "a b 好a"), (metaspace(), "ab a"), (word_piece(), "ab a"), (words(), "ab a ab")],
    ids=["sentencepiece", "metaspace", "wordpiece", "words"],
)
def test_joined_bytes_are_the_decoded_text(made: tokenizers.Tokenizer, text: str) -> None:
    table = all_token_bytes(made, made.get_vocab_size())
    ids = made.encode(text).ids
    assert b"".join(table[i] for i in ids).decode().removeprefix(" ") == made.decode(ids) == text


def test_special_tokens_add_nothing_and_added_words_themselves() -> None:
    made = words()
    made.add_special_tokens(["<end>"])
    made.add_tokens(["好"])
    assert all_token_bytes(made, 6)[3:] == [b"", "好".encode(), b""]


def test_byte_characters_are_those_of_the_library() -> None:
    table = byte_characters()
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    assert (table["Ġ"], table["Ċ"], table["a"]) == (0x20, 0x0A, 0x61)
