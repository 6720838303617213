"""The rules of verse on lines whose verdict a reader of Tang poems would give."""

import pytest

from framework.core.errors import DataError
from framework.core.records import Message
from framework.tasks.domain.verse import Request, is_regular, keeps_form, keeps_tones, requests
from framework.tasks.task import corpus_folder, get

LINE = Request("白日依山盡", "流", "黃河入海流。")


@pytest.mark.parametrize(
    ("text", "regular"),
    [
        ("白日依山盡，黃河入海流。欲窮千里目，更上一層樓。", True),
        ("朝辭白帝彩雲間，千里江陵一日還。", True),
        ("", False),
        ("白日依山盡，黃河入海流", False),
        ("白日依山盡。黃河入海流。", False),
        ("白日依山盡，黃河入海。", False),
        ("白日依山盡，朝辭白帝彩雲間。", False),
        ("白日依山盡，黃河入海流。朝辭白帝彩雲間，千里江陵一日還。", False),
        ("白日依山盡，黃河入海流。欲窮", False),
        ("abc，白日依山盡，黃河入海流。", False),
    ],
)
def test_regular_verse(text: str, regular: bool) -> None:
    assert is_regular(text) is regular
    assert get("verse_form").judge(None, f" {text}\n") == float(regular)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("黃河入海流。", 1.0),
        ("江入大荒流。", 1.0),
        ("海上生明月。", 0.0),
        ("流水入東海。", 0.0),
        ("黃河入海流", 0.0),
        ("流流流。", 0.0),
        ("黃河之水天上流。", 0.0),
    ],
)
def test_a_completion_needs_form_and_character(text: str, score: float) -> None:
    assert get("assigned_rhyme").judge(LINE, text) == score


def test_the_form_is_that_of_the_first_line() -> None:
    assert keeps_form(Request("朝辭白帝彩雲間", "還", ""), "千里江陵一日還。")
    assert not keeps_form(LINE, "千里江陵一日還。")


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("黃河入海流。", True),  # 平平仄仄平: level, oblique; ends level
        ("更上一層樓。", True),  # 仄仄仄平平
        ("千里江陵一日還。", True),  # 平仄平平仄仄平
        ("白日依山盡。", False),  # 仄仄平平仄 ends oblique: a first line
        ("黃河流天流。", False),  # second and fourth both level
        ("黃河入海。", False),
        ("", False),
    ],
)
def test_tones(line: str, kept: bool) -> None:
    assert keeps_tones(line) is kept
    assert get("tone_pattern").judge(LINE, line) == float(kept)


def test_poets_answers_pass_their_own_task() -> None:
    couplet, tones = get("assigned_rhyme"), get("tone_pattern")
    examples = couplet.examples("valid")
    assert all(couplet.judge(example, example.answer) == 1.0 for example in examples)
    assert sum(tones.judge(example, example.answer) for example in examples) / len(examples) > 0.85


def test_prompts_are_those_of_the_corpus() -> None:
    first = requests("train")[0]
    assert get("assigned_rhyme").prompt(first) == (Message("user", first.prompt),)
    assert f'"instruction": "{first.prompt}"' in (corpus_folder("tang") / "sft.train.jsonl").read_text().splitlines()[0]
    assert get("verse_form").prompt(None) == ()


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(DataError, match="there is no part 'dev'; choose train, valid or test"):
        requests("dev")
