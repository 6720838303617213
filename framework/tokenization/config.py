"""How a tokenizer is trained."""

from dataclasses import dataclass, field

from framework.core.config import Choice, require

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"  # ends a document and every turn of a conversation
REQUIRED_TOKENS = (END_TOKEN, "<|user|>", "<|assistant|>")  # the chat template writes them
NUM_BYTES = 256


class TokenizerKind(Choice):
    """What a token is."""

    CHARACTER = "character"  # every character of the text a token, bytes behind it for all others
    BPE = "bpe"  # byte-level byte-pair encoding


@dataclass(frozen=True)
class TokenizerConfig:
    """Vocabulary size, special tokens included, and the pieces that are never split."""

    kind: TokenizerKind = TokenizerKind.BPE
    vocab_size: int = 4096
    special_tokens: list[str] = field(
        default_factory=lambda: [PAD_TOKEN, END_TOKEN, "<|user|>", "<|assistant|>", "<|system|>"]
    )

    def __post_init__(self) -> None:
        tokens = self.special_tokens
        least = NUM_BYTES + len(tokens)
        require(
            len(set(tokens)) == len(tokens) and "" not in tokens,
            f"tokenizer.special_tokens={tokens} names a token twice, or an empty one",
        )
        missing = [token for token in REQUIRED_TOKENS if token not in tokens]
        require(not missing, f"tokenizer.special_tokens lacks {', '.join(missing)}, which the chat template writes")
        require(
            self.vocab_size > least,
            f"tokenizer.vocab_size={self.vocab_size} must be more than {least}: {NUM_BYTES} bytes and {len(tokens)} "
            "special tokens",
        )
