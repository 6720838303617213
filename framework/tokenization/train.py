"""Train a tokenizer: characters, byte-level byte-pair encoding (Sennrich et al. 2016), a unigram language model
(Kudo 2018), or WordPiece (Schuster and Nakajima 2012, cut as BERT cuts).

With bytes behind the first three nothing is ever unknown and every text comes back from its ids, each character of it.
WordPiece keeps words and loses the white space between them; a word with a character that training never saw is
[UNK], which decoding shows. The result is a plain `tokenizer.json` that the `tokenizers` library runs by itself. Left
out: normalisation, which would lose text; only WordPiece has it, and only where the recipe asks (`lowercase`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from framework.core.errors import DataError
from framework.tokenization.config import (
    BYTE_ALPHABET,
    END_TOKEN,
    ESCAPE,
    ESCAPED,
    MASK_TOKEN,
    NUM_BYTES,
    PAD_TOKEN,
    UNKNOWN_TOKEN,
    TokenizerConfig,
    TokenizerKind,
)
from framework.tokenization.load import HubTokenizer
from framework.tokenization.pieces import (
    CONTINUED,
    count_words,
    frequent_characters,
    learn_pieces,
    learn_word_pieces,
)
from framework.tokenization.template import default_template

# How text is cut before merging: contractions, words, single digits, punctuation, line ends, spaces (Qwen2's pattern).
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before pieces are weighed: as above, and with nothing but a space in front of a word.
_WORDS = r"␛[01]| ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}␛]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# The space that WordPiece's decoder puts before a Chinese character, its punctuation, or a full-width form.
_NO_SPACE_BEFORE = "^ (?=[\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U000323af])"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(NUM_BYTES)]
_BYTE_SCORE = -1000.0
SPACE = "▁"  # SentencePiece's: how unigram pieces spell a space


def train(texts: Iterator[str], config: TokenizerConfig, progress: Callable[[int], None] | None = None) -> HubTokenizer:
    """Learn a vocabulary of at most `config.vocab_size` tokens from `texts`, read once; equal texts, equal tokenizer.

    Special tokens have the first ids, in the order of the recipe. `progress` is told the characters read so far.
    """
    told = counted(texts, progress)
    trained = _KINDS[config.kind](told, config)
    # A document begins with the token that ends one, as GPT-2's do: only so is its first word predicted too.
    begin = (END_TOKEN, config.specials.index(END_TOKEN))
    trained.post_processor = processors.TemplateProcessing(single=f"{END_TOKEN} $A", special_tokens=[begin])
    trained.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in config.specials])
    return HubTokenizer(trained, _hub_config(config), default_template(config.specials))


def _character(texts: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    """A byte-pair model without merges: each character is a token, or falls back to its UTF-8 bytes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    tokens = [*config.specials, *_BYTE_TOKENS]
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    tokens += [c for c in by_frequency if c not in config.specials][: config.vocab_size - len(tokens)]
    vocab = {token: index for index, token in enumerate(tokens)}
    trained = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    trained.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return trained


def _bpe(texts: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=config.specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return trained


def _unigram(texts: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    """Special tokens, bytes, escapes, then pieces by score. A byte's score is so low that only what no piece spells is
    spelled in bytes; `unk_id` is asked for by the library and never comes out."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Replace(ESCAPE, ESCAPED[0]), normalizers.Replace(SPACE, ESCAPED[1])]
    )
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
        ]
    )
    spelled = [decoders.Replace(SPACE, " "), decoders.Replace(ESCAPED[1], SPACE), decoders.Replace(ESCAPED[0], ESCAPE)]
    trained.decoder = decoders.Sequence([*spelled, decoders.ByteFallback(), decoders.Fuse()])
    fixed = [*config.specials, *_BYTE_TOKENS, *ESCAPED]
    size = config.vocab_size - len(fixed)
    words = count_words(trained, texts)
    needed = [*BYTE_ALPHABET, SPACE]
    alphabet = {*needed, *frequent_characters(words, max(0, min(size // 2, size - len(needed))))}
    pieces = learn_pieces(words, size, alphabet)
    scores = [*[0.0] * len(config.specials), *[_BYTE_SCORE] * NUM_BYTES, *[0.0] * len(ESCAPED)]
    vocab = [*zip(fixed, scores, strict=True), *((p, score) for p, score in pieces if p not in fixed)]
    trained.model = models.Unigram(vocab, unk_id=0, byte_fallback=True)
    return trained


def _wordpiece(texts: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    """Cut at white space and around every punctuation mark and Chinese character; then the longest piece first."""
    trained = tokenizers.Tokenizer(models.WordPiece())
    trained.normalizer = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=True, strip_accents=config.lowercase, lowercase=config.lowercase
    )
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    joined = decoders.Replace(Regex(_NO_SPACE_BEFORE), "")  # Chinese is written without spaces
    trained.decoder = decoders.Sequence([decoders.WordPiece(prefix=CONTINUED, cleanup=False), joined])
    fixed = [*config.specials, UNKNOWN_TOKEN]
    pieces = learn_word_pieces(count_words(trained, texts), config.vocab_size - len(fixed))
    vocab = {piece: index for index, piece in enumerate([*fixed, *(p for p in pieces if p not in fixed)])}
    trained.model = models.WordPiece(vocab, unk_token=UNKNOWN_TOKEN, continuing_subword_prefix=CONTINUED)
    return trained


_KINDS = {
    TokenizerKind.CHARACTER: _character,
    TokenizerKind.BPE: _bpe,
    TokenizerKind.UNIGRAM: _unigram,
    TokenizerKind.WORDPIECE: _wordpiece,
}


def _hub_config(config: TokenizerConfig) -> dict[str, Any]:
    """tokenizer_config.json; a tokenizer without a pad token pads with its end token, which masks make harmless."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TOKEN,
        "eos_token": END_TOKEN,
        "pad_token": PAD_TOKEN if PAD_TOKEN in config.specials else END_TOKEN,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        **({"mask_token": MASK_TOKEN} if config.mask else {}),
    }


def counted(texts: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    """`texts`; `progress` is told the characters read so far. DataError where there are none."""
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if progress is not None:
            progress(seen)
    if seen == 0:
        raise DataError("there is no text to learn a tokenizer from")
