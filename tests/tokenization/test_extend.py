"""Extending: old ids stay, texts without new pieces encode as before, and of pairs each new id is its old ids."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from framework.core.errors import DataError, UsageError
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.extend import Extension, extend
from framework.tokenization.load import HubTokenizer, load
from framework.tokenization.train import train

ENGLISH = ["the cat sat on the mat, the rat ran. ", "that cat can chat: 1234 times!\n", "a naïve 好 café"] * 4
CHINESE = ["床前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。", "明月松間照，the 明月光 😀"] * 4
KINDS = list(TokenizerKind)
ANY = st.text(
    st.one_of(st.sampled_from("床前明月光，疑是地上霜。thecat \n1😀é"), st.characters(exclude_categories=["Cs"])),
    max_size=30,
)


def published(style: str) -> HubTokenizer:
    """As GPT-2's, Llama 3's (whole words first, special tokens behind the model's), and Llama 2's folders are built."""
    if style == "llama2":
        vocab = {
            t: i
            for i, t in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁thecasn", "▁t", "he", "▁the"])
        }
        merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
        made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        state = json.loads(train(iter(ENGLISH), TokenizerConfig(vocab_size=330)).backend.to_str())
        vocab = {t: i for i, t in enumerate([t for t in state["model"]["vocab"] if not t.startswith("<|")])}
        # a token that its own merges never make, as published vocabularies have some: æĺİæľĪ is 明月
        vocab["æĺİæľĪ"] = len(vocab)
        model = models.BPE(vocab, [tuple(m) for m in state["model"]["merges"]], ignore_merges=style == "llama3")
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r" ?\p{L}+|\s|[^\p{L}\s]+"), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in ("</s>", "<|im_start|>", "<|im_end|>")])
    made.add_tokens(["cat nap"])
    return HubTokenizer(made, {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}, None)


def made(kind: TokenizerKind | str) -> HubTokenizer:
    if isinstance(kind, str):
        return published(kind)
    return train(iter(ENGLISH), TokenizerConfig(kind=kind, vocab_size=330))


@pytest.fixture(scope="module", params=[*KINDS, "gpt2", "llama3", "llama2"], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[HubTokenizer, Extension]:
    old = made(request.param)
    return old, extend(old, iter(CHINESE), 60)


PAIRS = ["gpt2", "llama3", "llama2", TokenizerKind.BPE, TokenizerKind.CHARACTER]


def expanded(ids: list[int], extension: Extension) -> list[int]:
    return [part for i in ids for part in extension.sub_pieces.get(i, (i,))]


def test_every_old_token_keeps_its_id_and_new_ones_follow(case: tuple[HubTokenizer, Extension]) -> None:
    old, extension = case
    new = extension.tokenizer
    before, after = (t.backend.get_vocab(with_added_tokens=True) for t in (old, new))
    assert before.items() <= after.items()
    assert new.end_id == old.end_id
    ids = sorted(set(after.values()) - set(before.values()))
    assert ids == list(extension.sub_pieces) == list(range(old.vocab_size, new.vocab_size))
    assert 0 < len(ids) <= 60
    assert all(part < old.vocab_size for parts in extension.sub_pieces.values() for part in parts)
    for token in old.backend.get_added_tokens_decoder().values():
        assert new.encode(token.content) == old.encode(token.content)


def test_a_text_without_new_pieces_is_spelled_as_before(case: tuple[HubTokenizer, Extension]) -> None:
    old, extension = case

    @settings(max_examples=200, deadline=None)
    @given(ANY)
    def check(text: str) -> None:
        ids = extension.tokenizer.encode(text)
        if not extension.sub_pieces.keys() & set(ids):
            assert ids == old.encode(text)

    check()
    for text in ENGLISH:
        assert extension.tokenizer.encode(text) == old.encode(text)


@pytest.mark.parametrize("kind", PAIRS, ids=str)
def test_of_pairs_each_new_id_in_any_text_is_its_old_ids(kind: TokenizerKind | str) -> None:
    old = made(kind)
    extension = extend(old, iter(CHINESE), 60)

    @settings(max_examples=300, deadline=None)
    @given(ANY)
    def check(text: str) -> None:
        assert expanded(extension.tokenizer.encode(text), extension) == old.encode(text)

    check()
    for text in CHINESE:
        assert expanded(extension.tokenizer.encode(text), extension) == old.encode(text)


def test_it_spells_the_new_text_in_fewer_tokens_and_loses_nothing_more(case: tuple[HubTokenizer, Extension]) -> None:
    old, extension = case
    new = extension.tokenizer
    for text in CHINESE:
        if "[UNK]" not in old.decode(old.encode(text)):
            assert len(new.encode(text)) < len(old.encode(text))
        assert new.decode(new.encode(text)).count("[UNK]") <= old.decode(old.encode(text)).count("[UNK]")
        if old.decode(old.encode(text)) == text:
            assert new.decode(new.encode(text)) == text


def test_transformers_reads_it(case: tuple[HubTokenizer, Extension], tmp_path: Path) -> None:
    _, extension = case
    extension.tokenizer.save(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in [*ENGLISH, *CHINESE, "cat nap</s><|im_end|> 明月 x"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == extension.tokenizer.encode(text)
    assert len(theirs) == extension.tokenizer.vocab_size
    assert load(tmp_path).fingerprint == extension.tokenizer.fingerprint


def test_a_class_that_builds_its_own_pipeline_reads_it_too(tmp_path: Path) -> None:
    """transformers' Qwen2Tokenizer takes vocabulary and merges from tokenizer.json and the rest from its own code."""
    state = json.loads(train(iter(ENGLISH), TokenizerConfig(vocab_size=330)).backend.to_str())
    vocab = {t: i for i, t in enumerate(t for t in state["model"]["vocab"] if not t.startswith("<|"))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m) for m in state["model"]["merges"]]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = made(TokenizerKind.BPE).backend.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    old = HubTokenizer(backend, config, None)
    extension = extend(old, iter(CHINESE), 60)
    extension.tokenizer.save(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(theirs).__name__ == "Qwen2Tokenizer"
    assert old.backend.get_vocab(with_added_tokens=True).items() <= theirs.get_vocab().items()
    for text in [*ENGLISH, *CHINESE, "é e\u0301<|im_end|> 明月"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == extension.tokenizer.encode(text)


def test_pairs_by_hand() -> None:
    """月 is E6 9C 88, æ ľ Ī in GPT-2's letters; the vocabulary knows æ ľ, so one merge is left to make, then 月月."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*alphabet, "æľ"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("æ", "ľ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    extension = extend(HubTokenizer(backend, {"eos_token": "</s>"}, None), iter(["月月,月月", "月"]), 2)
    state: dict[str, Any] = json.loads(extension.tokenizer.backend.to_str())["model"]
    assert state["merges"] == [["æ", "ľ"], ["æľ", "Ī"], ["æľĪ", "æľĪ"]]
    assert extension.sub_pieces == {258: (256, vocab["Ī"]), 259: (256, vocab["Ī"], 256, vocab["Ī"])}
    assert extension.tokenizer.encode("月月月</s>") == [259, 258, 257]


def test_new_characters_come_first_where_bytes_are_a_fallback() -> None:
    """Three characters by frequency, then the pair; 霜 stands once and stays in bytes. Words are not crossed."""
    extension = extend(published("llama2"), iter(["明月,明月 月霜"]), 9)
    new = extension.tokenizer
    assert [new.token_text(i) for i in extension.sub_pieces] == ["月", "明", "明月"]
    first = min(extension.sub_pieces)
    assert extension.sub_pieces[first + 2] == extension.sub_pieces[first + 1] + extension.sub_pieces[first]
    assert [new.token_text(i) for i in new.encode("霜")] == ["▁", "<0xE9>", "<0x9C>", "<0x9C>"]


def test_letters_and_marks_are_not_joined_into_a_piece() -> None:
    extension = extend(made(TokenizerKind.BPE), iter(CHINESE), 200)
    spelled = [
        b"".join(map(extension.tokenizer.token_bytes, [i])).decode(errors="ignore") for i in extension.sub_pieces
    ]
    assert "明月" in spelled
    assert not [text for text in spelled if len(text) > 1 and set(text) & set("，。")]


def test_a_longer_word_piece_leaves_no_rest_that_cannot_be_spelled() -> None:
    """abc is new; of abcx, spelled ab ##cx before, the rest x needs ##x, which is appended first."""
    vocab = {t: i for i, t in enumerate(["[UNK]", "a", "ab", "##c", "##cx", "##b"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["</s>"])
    old = HubTokenizer(backend, {"eos_token": "</s>"}, None)
    extension = extend(old, iter(["abc abc abc"]), 2)
    spelled = {extension.tokenizer.token_text(i): parts for i, parts in extension.sub_pieces.items()}
    assert spelled == {"##x": (0,), "##bc": (5, 3)} or spelled == {"##x": (0,), "abc": (2, 3)}
    longer = extend(old, iter(["abc abc abc"]), 9)
    assert [longer.tokenizer.token_text(i) for i in longer.tokenizer.encode("abcx")] == ["abc", "##x"]
    assert old.encode("abcx") == [2, 4]
    with pytest.raises(UsageError, match=r"new_tokens=1 must be more than 1: so many characters of old pieces"):
        extend(old, iter(["abc abc"]), 1)


def test_what_cannot_be_extended_is_refused() -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))
    with pytest.raises(UsageError, match="a WordLevel vocabulary cannot be extended"):
        extend(HubTokenizer(words, {"eos_token": "</s>"}, None), iter(CHINESE), 5)
    bare = tokenizers.Tokenizer(models.BPE({"</s>": 0}, []))
    with pytest.raises(UsageError, match="BPE without bytes behind it cannot be extended"):
        extend(HubTokenizer(bare, {"eos_token": "</s>"}, None), iter(CHINESE), 5)
    marked = tokenizers.Tokenizer(models.BPE({"</s>": 0}, [], end_of_word_suffix="</w>"))
    with pytest.raises(UsageError, match="marks for the inside or the end of words"):
        extend(HubTokenizer(marked, {"eos_token": "</s>"}, None), iter(CHINESE), 5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_new_is_an_error(kind: TokenizerKind) -> None:
    with pytest.raises(DataError, match="the text holds no piece, seen twice"):
        extend(made(kind), iter(["a"]), 5)
    with pytest.raises(DataError, match="there is no text"):
        extend(made(kind), iter([]), 5)
