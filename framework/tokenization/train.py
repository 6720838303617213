"""Train a tokenizer: characters with bytes behind them, or byte-level byte-pair encoding (Sennrich et al. 2016).

Either way nothing is ever unknown and every text comes back from its ids. The result is a plain `tokenizer.json` that
the `tokenizers` library runs by itself. Left out: normalisation, which would lose text.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from framework.core.errors import DataError
from framework.tokenization.config import END_TOKEN, NUM_BYTES, PAD_TOKEN, TokenizerConfig, TokenizerKind
from framework.tokenization.load import HubTokenizer
from framework.tokenization.template import default_template

# How text is cut before merging: contractions, words, single digits, punctuation, line ends, spaces (Qwen2's pattern).
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: Iterator[str], config: TokenizerConfig, progress: Callable[[int], None] | None = None) -> HubTokenizer:
    """Learn a vocabulary of at most `config.vocab_size` tokens from `texts`, read once; equal texts, equal tokenizer.

    Special tokens have the first ids, in the order of the recipe. `progress` is told the characters read so far.
    """
    counted = _counted(texts, progress)
    trained = _character(counted, config) if config.kind is TokenizerKind.CHARACTER else _bpe(counted, config)
    # A document begins with the token that ends one, as GPT-2's do: only so is its first word predicted too.
    begin = (END_TOKEN, config.special_tokens.index(END_TOKEN))
    trained.post_processor = processors.TemplateProcessing(single=f"{END_TOKEN} $A", special_tokens=[begin])
    trained.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in config.special_tokens])
    return HubTokenizer(trained, _hub_config(config), default_template(config.special_tokens))


def _character(texts: Iterator[str], config: TokenizerConfig) -> tokenizers.Tokenizer:
    """A byte-pair model without merges: each character is a token, or falls back to its UTF-8 bytes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    tokens = [*config.special_tokens, *(f"<0x{byte:02X}>" for byte in range(NUM_BYTES))]
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    tokens += [c for c in by_frequency if c not in config.special_tokens][: config.vocab_size - len(tokens)]
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
        special_tokens=config.special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return trained


def _hub_config(config: TokenizerConfig) -> dict[str, Any]:
    """tokenizer_config.json; a tokenizer without a pad token pads with its end token, which masks make harmless."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TOKEN,
        "eos_token": END_TOKEN,
        "pad_token": PAD_TOKEN if PAD_TOKEN in config.special_tokens else END_TOKEN,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }


def _counted(texts: Iterator[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text)
        if progress is not None:
            progress(seen)
    if seen == 0:
        raise DataError("there is no text to learn a tokenizer from")
