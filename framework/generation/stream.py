"""Text from tokens as they arrive: a character spelled by several tokens appears with the last of them.

Left out: stop tokens and special tokens; the former end the loop that feeds this page, the latter add no bytes.
"""

import codecs

from framework.core.records import Tokenizer


class TextStream:
    """The pieces of all `push` calls and of `finish`, joined, are the tokens' bytes decoded as one UTF-8 text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """What this token completes; empty while a character is unfinished. Bytes that can never become a character
        are U+FFFD, as the tokens spell it."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What was still held back: a character cut off by the end is one U+FFFD, as it would be in any decoding."""
        return self._decoder.decode(b"", final=True)
