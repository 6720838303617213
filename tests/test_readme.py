"""README.md and README.zh.md say the same: what needs no translation is equal in both."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    return _BLOCK.sub("", page)


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", page)


def shape(page: str) -> list[str]:
    """Headings by depth, bullets and table rows, in order."""
    return re.findall(r"^(#+ |- |\|)", prose(page), re.MULTILINE)


def test_both_hold_the_same_code_blocks() -> None:
    assert len(_BLOCK.findall(ENGLISH)) >= 3
    assert _BLOCK.findall(ENGLISH) == _BLOCK.findall(CHINESE)


def test_both_have_the_same_headings_bullets_and_rows() -> None:
    assert shape(ENGLISH).count("## ") >= 4
    assert shape(ENGLISH) == shape(CHINESE)


def test_both_name_the_same_words_files_and_pages() -> None:
    """In any order within the page, for sentences are built differently."""
    words = [Counter(re.findall(r"`([^`\n]+)`", prose(page))) for page in (ENGLISH, CHINESE)]
    assert words[0] == words[1]
    assert Counter(links(ENGLISH)[1:]) == Counter(links(CHINESE)[1:])
    assert links(ENGLISH)[0] == "README.zh.md", "each page begins with a way to the other"
    assert links(CHINESE)[0] == "README.md"


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_every_link_leads_somewhere(page: str) -> None:
    assert [link for link in links(page) if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_chinese_page_is_chinese() -> None:
    lines = [line for line in prose(CHINESE).splitlines() if len(line) > 40 and not line.startswith("|")]
    assert lines
    assert [line for line in lines if not re.search(r"[\u4e00-\u9fff]", line)] == []
