"""Pieces of text from tokens: whole characters only, and together the same text as decoding all bytes at once."""

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from framework.generation.stream import TextStream, answer_text, token_texts


class ByteTable:
    """A tokenizer reduced to what a stream asks of it: token i spells table[i]."""

    def __init__(self, table: Sequence[bytes]):
        self.table = table

    def token_bytes(self, token_id: int) -> bytes:
        return self.table[token_id]

    def token_text(self, token_id: int) -> str:
        return f"<|{token_id}|>"


def pieces(table: Sequence[bytes]) -> list[str]:
    stream = TextStream(ByteTable(table))
    return [stream.push(i) for i in range(len(table))]


def test_a_character_split_over_tokens_appears_whole() -> None:
    assert pieces([b"\xe6", b"\x98", b"\xa5", b"!"]) == ["", "", "春", "!"]


def test_a_special_token_adds_nothing_and_does_not_break_a_character() -> None:
    assert pieces([b"\xe6\x98", b"", b"\xa5"]) == ["", "", "春"]


def test_broken_bytes_are_shown_as_what_they_are() -> None:
    assert pieces([b"a\xff", b"b"]) == ["a\ufffd", "b"]
    assert pieces([b"\xe6\x98", b"a"]) == ["", "\ufffda"]
    assert pieces(["\ufffd".encode()[:1], "\ufffd".encode()[1:]]) == ["", "\ufffd"], "the tokens spell it"


def test_a_character_that_the_end_cuts_off_never_appears() -> None:
    assert pieces([b"a", b"\xe6\x98"]) == ["a", ""]
    assert answer_text(ByteTable([b"\xf0\x9f\x98", b"", b"\x80", b"b\xf0\x9f"]), [0, 1, 2, 3]) == "😀b"


def test_each_token_has_the_text_that_it_completes() -> None:
    table = ByteTable([b"\xe6\x98", b"", b"\xa5a", b"\xe6"])
    assert token_texts(table, [1, 0, 2, 3]) == ["<|1|>", "", "春a", ""]


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 120), max_size=20))
def test_any_split_of_a_text_gives_the_text_and_no_replacement_character(text: str, cuts: list[int]) -> None:
    parts = _split(text.encode(), cuts)
    got = pieces(parts)
    assert "".join(got) == text
    assert sum(piece.count("\ufffd") for piece in got) == text.count("\ufffd")


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=20))
def test_any_split_of_any_bytes_gives_their_decoding_less_a_character_cut_off(data: bytes, cuts: list[int]) -> None:
    got, whole = "".join(pieces(_split(data, cuts))), data.decode(errors="replace")
    assert got == whole or (got + "\ufffd" == whole and _is_cut_off(data))


def _is_cut_off(data: bytes) -> bool:
    """Whether more bytes could make a character of the last ones."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        rest = data[error.start :] if error.reason == "unexpected end of data" else b""
        return bool(rest) or _is_cut_off(data[error.end :])
    return False


def _split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]
