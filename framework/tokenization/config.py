"""How a tokenizer is trained."""

from dataclasses import dataclass, field

from framework.core.config import Choice, require


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
        default_factory=lambda: ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    )

    def __post_init__(self) -> None:
        require(
            self.vocab_size >= 300, f"tokenizer.vocab_size={self.vocab_size} must be at least 300: 256 bytes and more"
        )
