"""Text from tokens as they arrive: a character spelled by several tokens appears with the last of them.

What is no character yet is held back; where the tokens end before it is one (a limit cut it off), it never appears. So
U+FFFD is shown only where the tokens spell it, or spell bytes that no further token could make a character.
Left out: stop tokens and special tokens; the former end the loop that feeds this page, the latter add no bytes.
"""

import codecs
from collections.abc import Iterable

from framework.core.records import Tokenizer


class TextStream:
    """The pieces of all `push` calls, joined, are the tokens' bytes decoded as one UTF-8 text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """What this token completes; empty while a character is unfinished."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


def answer_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """What the tokens spell, byte for byte: it continues a prompt with its spaces, and is what a stream shows."""
    stream = TextStream(tokenizer)
    return "".join(map(stream.push, ids))


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """One text a token: what it completes, empty within a character; a special token as the vocabulary spells it."""
    stream = TextStream(tokenizer)
    return [stream.push(i) if tokenizer.token_bytes(i) else tokenizer.token_text(i) for i in ids]
