"""Training: ids worked by hand, any text comes back, equal to transformers in ids and rendering, deterministic."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from framework.core.errors import DataError, UsageError
from framework.core.records import Message
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.load import HubTokenizer, load
from framework.tokenization.train import train

TEXTS = [
    "床前明月光，疑是地上霜。",
    "The quick brown fox: 1234 times!\n",
    "mixed 文字 and 😀 emoji 😀",
    "aaab aaab aaab",
] * 3
CHAT = [
    Message("system", "be kind"),
    Message("user", " 以春字作\n😀 hi "),
    Message("assistant", " 江海 ok\n"),
    Message("user", "<|end|> & <b>"),
]
KINDS = list(TokenizerKind)
LOSSLESS = [kind for kind in KINDS if kind is not TokenizerKind.WORDPIECE]
# Emoji in families, marks without a base, spaces of every kind, and what the tokenizers themselves write.
HARD = [
    "👨‍👩‍👧‍👦 🏳️‍🌈 é\u0301\u0301", "\u0301\u200d\ufe0f", "a\u3000b\u00a0 \t\r\n\n ", " ", "  a  ", "▁a▁ ▁▁", "␛0␛1␛▁0␛",
    "<0x41><0xE6>", "##a [UNK]", "\ufffd\x00\U0010ffff", "Ġthe", "ﬁ Å Å",
]  # fmt: skip


def trained(kind: TokenizerKind, vocab_size: int = 400) -> HubTokenizer:
    return train(iter(TEXTS), TokenizerConfig(kind=kind, vocab_size=vocab_size))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def tokenizer(request: pytest.FixtureRequest) -> HubTokenizer:
    return trained(request.param)


@pytest.fixture(scope="module", params=LOSSLESS, ids=str)
def lossless(request: pytest.FixtureRequest) -> HubTokenizer:
    return trained(request.param)


def test_characters_by_hand() -> None:
    """Five special tokens, 256 bytes, then characters by frequency, ties by code point; beyond the size: bytes."""
    learned = train(iter(["bbac", "b"]), TokenizerConfig(kind=TokenizerKind.CHARACTER, vocab_size=5 + 256 + 2))
    assert learned.vocab_size == 263
    assert learned.encode("ba<|end|>c") == [261, 262, 1, 5 + ord("c")]
    assert learned.encode("é") == [5 + 0xC3, 5 + 0xA9]
    assert [learned.token_text(i) for i in (0, 1, 2, 3, 4)] == TokenizerConfig().special_tokens


def test_pairs_merge_the_most_frequent_first() -> None:
    learned = train(iter(["aab aab aab"]), TokenizerConfig(vocab_size=5 + 256 + 2))
    assert [learned.token_text(i) for i in (261, 262)] in (["aa", "aab"], ["ab", "aab"])
    assert len(learned.encode("aab")) == 1


def test_unigram_by_hand() -> None:
    """The bytes, the two escapes, then pieces by score; what no piece spells is bytes, and nothing else is."""
    learned = train(
        iter(["the cat sat. the cat ran. " * 40]), TokenizerConfig(kind=TokenizerKind.UNIGRAM, vocab_size=320)
    )
    assert [learned.token_text(5 + n) for n in (0, 255, 256, 257)] == ["<0x00>", "<0xFF>", "␛0", "␛1"]
    assert learned.encode("é") == [5 + 0xC3, 5 + 0xA9]
    assert [learned.token_text(i) for i in learned.encode("▁␛<0x0A>")] == ["␛1", "␛0", "<", "0", "x", "0", "A", ">"]
    assert learned.token_bytes(5 + 257) == "▁".encode()


def test_unigram_takes_the_likeliest_pieces(tmp_path: Path) -> None:
    """Against a search of our own over all the ways to cut a word."""
    learned = train(
        iter(["the cat sat there. that cat ran. " * 40]), TokenizerConfig(kind=TokenizerKind.UNIGRAM, vocab_size=330)
    )
    learned.save(str(tmp_path))
    score = dict(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"])

    def best(word: str) -> float:
        known = [n for n in range(1, len(word) + 1) if word[:n] in score]
        return max((score[word[:n]] + best(word[n:]) for n in known), default=0.0)

    for word in ("that", "▁cat", "▁there", "ttherec"):
        pieces = [learned.token_text(i) for i in learned.encode(word.replace("▁", " "))]
        assert "".join(pieces) == word
        assert sum(score[piece] for piece in pieces) == pytest.approx(best(word))
    assert len(learned.encode(" the")) == 1, "what is frequent, and in several words, is one piece"


def test_unigram_spells_rare_characters_in_bytes_and_frequent_ones_never() -> None:
    text = "".join(chr(0x4E00 + n % 50) for n in range(20_000)) + "龘"
    learned = train(iter([text]), TokenizerConfig(kind=TokenizerKind.UNIGRAM, vocab_size=1000))
    assert [learned.token_text(i) for i in learned.encode("龘")] == ["<0xE9>", "<0xBE>", "<0x98>"]
    assert all(len(learned.encode(chr(0x4E00 + n))) == 1 for n in range(50))


def test_word_pieces_by_hand() -> None:
    """fox stands 3 times, fog twice: f then ##o are merged first, then fo with ##x, then with ##g. Longest first."""
    config = TokenizerConfig(kind=TokenizerKind.WORDPIECE, vocab_size=5 + 1 + 10)
    learned = train(iter(["fox fog 床前", "fox, fox fog"]), config)
    spelled = [learned.token_text(i) for i in range(5, learned.vocab_size)]
    assert spelled == ["[UNK]", "f", "##o", "##x", "##g", ",", "fo", "fox", "fog"]
    assert [learned.token_text(i) for i in learned.encode("fog,fo  foxo")] == ["fog", ",", "fo", "fox", "##o"]
    assert learned.decode(learned.encode("fog,fo\n fox")) == "fog , fo fox"


def test_word_pieces_show_what_they_lose_and_keep_case_unless_asked() -> None:
    config = TokenizerConfig(kind=TokenizerKind.WORDPIECE, vocab_size=100)
    learned = train(iter(["Élan Élan 床前"]), config)
    assert learned.decode(learned.encode("Élan zebra 床前")) == "Élan [UNK]床前"
    ids = learned.encode("床前 Élan 床")
    assert b"".join(map(learned.token_bytes, ids)) == learned.decode(ids).encode() == "床前 Élan床".encode()
    lower = train(iter(["Élan Élan"]), TokenizerConfig(kind=TokenizerKind.WORDPIECE, vocab_size=100, lowercase=True))
    assert lower.decode(lower.encode("ÉLAN")) == "elan"


def test_special_tokens_come_first_and_end_is_end(tokenizer: HubTokenizer) -> None:
    assert [tokenizer.encode(t) for t in TokenizerConfig().special_tokens] == [[0], [1], [2], [3], [4]]
    assert tokenizer.end_id == tokenizer.bos_id == 1


def test_any_text_comes_back(lossless: HubTokenizer) -> None:
    """Less the special tokens that it spells, which `encode` recognises and `decode` leaves out. Not of WordPiece."""
    special = re.compile("|".join(map(re.escape, TokenizerConfig().special_tokens)))

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text: str) -> None:
        ids, plain = lossless.encode(text), special.sub("", text)
        assert lossless.decode(ids) == plain
        assert b"".join(map(lossless.token_bytes, ids)) == plain.encode()
        assert lossless.encode_many([text, text]) == [ids, ids]

    check()
    for text in HARD:
        assert lossless.decode(lossless.encode(text)) == text


def test_transformers_reads_the_same_tokenizer(tokenizer: HubTokenizer, tmp_path: Path) -> None:
    """Beside a model's config.json too, as every model folder holds it."""
    tokenizer.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in [*TEXTS, "naïve\r\n\t  é 👨‍👩‍👧 <|end|>!", "", " ", "<0x41>▁ "]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == tokenizer.decode(
            tokenizer.encode(text)
        )
    chat = [{"role": m.role, "content": m.content} for m in CHAT]
    for prompt in (False, True):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render(CHAT, prompt) == expected
    assert (theirs.eos_token, theirs.bos_token, theirs.pad_token) == ("<|end|>", "<|end|>", "<|pad|>")
    assert len(theirs) == tokenizer.vocab_size


def test_the_rendering_word_for_word(tokenizer: HubTokenizer) -> None:
    assert tokenizer.render(CHAT[:3], True) == (
        "<|end|><|system|>be kind<|end|><|user|> 以春字作\n😀 hi <|end|><|assistant|> 江海 ok\n<|end|><|assistant|>"
    )
    with pytest.raises(DataError, match="no role 'tool'; the roles are system, user, assistant"):
        tokenizer.render([Message("tool", "x")], False)


def test_saving_and_loading_keeps_the_fingerprint(tokenizer: HubTokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path))
    again = load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_training_repeats(kind: TokenizerKind) -> None:
    assert trained(kind).fingerprint == trained(kind).fingerprint
    assert trained(kind).fingerprint != trained(kind, 40 if kind is TokenizerKind.WORDPIECE else 300).fingerprint


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_texts_stream_and_progress_counts_characters(kind: TokenizerKind) -> None:
    held = 0

    def texts() -> Iterator[str]:
        nonlocal held
        for text in TEXTS:
            held += 1
            yield text

    seen: list[int] = []
    train(texts(), TokenizerConfig(kind=kind, vocab_size=400), seen.append)
    assert held == len(TEXTS)
    assert seen[-1] == sum(map(len, TEXTS))
    assert seen == sorted(seen)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_text_is_an_error(kind: TokenizerKind) -> None:
    with pytest.raises(DataError, match="there is no text to learn"):
        train(iter([]), TokenizerConfig(kind=kind))


def test_recipes_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="must be more than 261: 256 bytes and 5 special tokens"):
        TokenizerConfig(vocab_size=261)
    with pytest.raises(UsageError, match="more than 282: 256 bytes, 21 pieces that spell them and 5 special tokens"):
        TokenizerConfig(kind=TokenizerKind.UNIGRAM, vocab_size=282)
    with pytest.raises(UsageError, match=r"lowercase=true is for tokenizer\.kind=wordpiece; bpe keeps every text"):
        TokenizerConfig(lowercase=True)
    with pytest.raises(UsageError, match="lacks <|end|>".replace("|", r"\|")):
        TokenizerConfig(special_tokens=["<|user|>", "<|assistant|>"])
    with pytest.raises(UsageError, match="names a token twice"):
        TokenizerConfig(special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|user|>"])
