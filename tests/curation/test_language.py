"""Sentences whose language nobody doubts."""

import sys

import pytest

from framework.core.errors import UsageError
from framework.curation import language as room
from framework.curation.language import language

SENTENCES = {
    "zh": "患者主诉头痛三天，既往有高血压病史，否认药物过敏。",
    "en": "The court held that the contract was void from the beginning.",
    "fr": "Le patient se plaint de maux de tête depuis trois jours.",
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "und": "123 + 456 = 579",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_sentences(code: str) -> None:
    assert language(SENTENCES[code]) == code


def test_classical_chinese_is_chinese() -> None:
    assert language("白日依山盡，黃河入海流。") == "zh"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    room._classify.cache_clear()
    with pytest.raises(UsageError, match=r"framework\[curation\]"):
        language("abc")
    room._classify.cache_clear()
