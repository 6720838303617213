"""Pieces of text from tokens: whole characters only, and together the same text as decoding all bytes at once."""

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from framework.generation.stream import TextStream


class ByteTable:
    """A tokenizer reduced to what a stream asks of it: token i spells table[i]."""

    def __init__(self, table: Sequence[bytes]):
        self.table = table

    def token_bytes(self, token_id: int) -> bytes:
        return self.table[token_id]


def pieces(table: Sequence[bytes]) -> list[str]:
    stream = TextStream(ByteTable(table))
    return [*(stream.push(i) for i in range(len(table))), stream.finish()]


def test_a_character_split_over_tokens_appears_whole() -> None:
    assert pieces([b"\xe6", b"\x98", b"\xa5", b"!"]) == ["", "", "春", "!", ""]


def test_a_special_token_adds_nothing_and_does_not_break_a_character() -> None:
    assert pieces([b"\xe6\x98", b"", b"\xa5"]) == ["", "", "春", ""]


def test_broken_bytes_are_shown_as_what_they_are() -> None:
    assert pieces([b"a\xff", b"b"]) == ["a\ufffd", "b", ""]
    assert pieces([b"a", b"\xe6\x98"]) == ["a", "", "\ufffd"]
    assert pieces([b"\xe6\x98", b"a"]) == ["", "\ufffda", ""]


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 120), max_size=20))
def test_any_split_of_a_text_gives_the_text_and_no_replacement_character(text: str, cuts: list[int]) -> None:
    parts = _split(text.encode(), cuts)
    got = pieces(parts)
    assert "".join(got) == text
    assert got[-1] == ""
    assert sum(piece.count("\ufffd") for piece in got) == text.count("\ufffd")


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=20))
def test_any_split_of_any_bytes_gives_their_decoding(data: bytes, cuts: list[int]) -> None:
    assert "".join(pieces(_split(data, cuts))) == data.decode(errors="replace")


def _split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]
