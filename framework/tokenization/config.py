"""How a tokenizer is trained, and how an existing one is extended."""

from dataclasses import dataclass, field

from framework.core.config import Choice, require

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"  # ends a document and every turn of a conversation
MASK_TOKEN = "<|mask|>"
SENTINEL = "<extra_id_{}>"  # as T5 spells them
REQUIRED_TOKENS = (END_TOKEN, "<|user|>", "<|assistant|>")  # the chat template writes them
UNKNOWN_TOKEN = "[UNK]"  # of wordpiece alone; no special token, so that decoding shows what was lost
NUM_BYTES = 256
ESCAPE = "\u241b"  # of unigram: this character and "▁" are spelled ESCAPE + "0" and ESCAPE + "1"
ESCAPED = (f"{ESCAPE}0", f"{ESCAPE}1")
BYTE_ALPHABET = "<0x123456789ABCDEF>"  # what the text "<0x0A>" is spelled with, so that it is no byte


class TokenizerKind(Choice):
    """What a token is."""

    CHARACTER = "character"  # every character of the text a token, bytes behind it for all others
    BPE = "bpe"  # byte-level byte-pair encoding
    UNIGRAM = "unigram"  # pieces of a unigram language model, bytes behind them, as SentencePiece has them
    WORDPIECE = "wordpiece"  # BERT's: the longest piece first, ## where it continues a word; loses white space


@dataclass(frozen=True)
class TokenizerConfig:
    """Vocabulary size, special tokens included, and the pieces that are never split.

    `extend` keeps the kind, the size and the special tokens of what it extends and reads `new_tokens` alone.
    """

    kind: TokenizerKind = TokenizerKind.BPE
    vocab_size: int = 4096
    special_tokens: list[str] = field(
        default_factory=lambda: [PAD_TOKEN, END_TOKEN, "<|user|>", "<|assistant|>", "<|system|>"]
    )
    mask: bool = False  # a special token <|mask|> behind those, for language.objective=masked
    sentinels: int = 0  # special tokens <extra_id_0> ... for language.objective=spans (T5: 100)
    lowercase: bool = False  # wordpiece: lower case, without accents, as bert-base-uncased
    new_tokens: int = 1000  # extend: how many pieces are learned at most

    def __post_init__(self) -> None:
        tokens = self.specials
        require(
            len(set(tokens)) == len(tokens) and "" not in tokens,
            f"tokenizer.special_tokens={tokens} names a token twice, or an empty one",
        )
        missing = [token for token in REQUIRED_TOKENS if token not in tokens]
        require(not missing, f"tokenizer.special_tokens lacks {', '.join(missing)}, which the chat template writes")
        what, least = _FIXED[self.kind]
        least += len(tokens)
        require(
            self.vocab_size > least,
            f"tokenizer.vocab_size={self.vocab_size} must be more than {least}: {what} and {len(tokens)} "
            "special tokens",
        )
        require(
            not self.lowercase or self.kind is TokenizerKind.WORDPIECE,
            f"tokenizer.lowercase=true is for tokenizer.kind=wordpiece; {self.kind} keeps every text as it is",
        )
        require(self.sentinels >= 0, f"tokenizer.sentinels={self.sentinels} must not be negative")
        require(self.new_tokens > 0, f"tokenizer.new_tokens={self.new_tokens} must be at least 1")

    @property
    def specials(self) -> list[str]:
        """All special tokens, in the order of their ids."""
        sentinels = [SENTINEL.format(number) for number in range(self.sentinels)]
        return [*self.special_tokens, *([MASK_TOKEN] if self.mask else []), *sentinels]


_BYTES = (f"{NUM_BYTES} bytes", NUM_BYTES)
_NUM_SPELLED = len(ESCAPED) + len(BYTE_ALPHABET)
_FIXED = {
    TokenizerKind.CHARACTER: _BYTES,
    TokenizerKind.BPE: _BYTES,
    TokenizerKind.UNIGRAM: (f"{NUM_BYTES} bytes, {_NUM_SPELLED} pieces that spell them", NUM_BYTES + _NUM_SPELLED),
    TokenizerKind.WORDPIECE: (f"{UNKNOWN_TOKEN}", 1),
}
