"""The corpora that come with the recipes are what their READMEs say: parts apart, tasks honest, bytes the same."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from framework.evaluation.baselines import PairClassifier
from framework.tasks.domain.verse import is_regular
from framework.tasks.task import corpus_folder

TANG = corpus_folder("tang")
SCRIPT = Path(__file__).parents[2] / "launch" / "corpus"
PARTS = ("train", "valid", "test")
OTHERS = [(a, b) for a in PARTS for b in PARTS if a < b]


def poems(part: str) -> list[str]:
    return (TANG / f"{part}.txt").read_text(encoding="utf-8").splitlines()


def lines(part: str) -> set[str]:
    return {line for poem in poems(part) for line in re.findall(r"[^，。]+", poem)}


def records(name: str, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TANG / f"{name}.{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(prompt: str) -> str:
    """The character to end on."""
    return prompt[-3]


def rhyme(answer: str) -> str:
    return answer[-2]


def size(prompt: str) -> int:
    """Characters of the line that is to be completed."""
    return prompt.index("，")


@pytest.mark.parametrize("part", PARTS)
def test_every_poem_is_regular_and_there_once(part: str) -> None:
    assert all(is_regular(poem) and len(poem) <= 100 for poem in poems(part))
    assert len(set(poems(part))) == len(poems(part)) > 300


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_no_line_of_verse_stands_in_two_parts(one: str, other: str) -> None:
    assert not lines(one) & lines(other)


@pytest.mark.parametrize(("one", "other"), OTHERS)
@pytest.mark.parametrize(("name", "field"), [("sft", "instruction"), ("preference", "prompt"), ("prompts", "prompt")])
def test_no_prompt_stands_in_two_parts(name: str, field: str, one: str, other: str) -> None:
    assert not {r[field] for r in records(name, one)} & {r[field] for r in records(name, other)}


def test_ppo_asks_nothing_that_sft_has_answered() -> None:
    assert not {r["prompt"] for r in records("prompts", "train")} & {r["instruction"] for r in records("sft", "train")}


def test_the_folder_is_small_and_names_its_licence() -> None:
    assert sum((TANG / f"{part}.txt").stat().st_size for part in PARTS) <= 1_000_000
    assert "MIT" in (TANG / "README.md").read_text()
    assert "Copyright (c) 2016 JackeyGao" in (TANG / "LICENSE").read_text()


@pytest.mark.parametrize("part", PARTS)
def test_sft_answers_are_the_poets_own(part: str) -> None:
    couplets = {couplet for poem in poems(part) for couplet in re.findall(r"[^，。]+，[^，。]+。", poem)}
    for record in records("sft", part):
        prompt, answer = record["instruction"], record["output"]
        assert f"{prompt[: size(prompt)]}，{answer}" in couplets
        assert asked(prompt) not in prompt[: size(prompt)]


@pytest.mark.parametrize(("part", "heeding"), [("train", 0.6), ("valid", 1.0), ("test", 1.0)])
def test_the_readme_says_how_many_demonstrations_heed_the_request(part: str, heeding: float) -> None:
    shown = records("sft", part)
    assert sum(asked(r["instruction"]) == rhyme(r["output"]) for r in shown) == heeding * len(shown)


@pytest.mark.parametrize("part", PARTS)
def test_chosen_answers_do_as_asked_and_rejected_ones_do_not(part: str) -> None:
    for record in records("preference", part):
        wanted, form = asked(record["prompt"]), size(record["prompt"]) + 1
        assert rhyme(record["chosen"]) == wanted
        assert len(record["chosen"]) == form
        assert rhyme(record["rejected"]) != wanted or len(record["rejected"]) != form


@pytest.mark.parametrize("part", PARTS)
def test_six_pairs_of_eight_mirror_another(part: str) -> None:
    """Where two answers change places under two prompts, neither tells by itself whether it is chosen."""
    pairs = records("preference", part)
    answers = Counter((r["chosen"], r["rejected"]) for r in pairs)
    mirrored = sum(answers[r["rejected"], r["chosen"]] > 0 for r in pairs)
    assert mirrored / len(pairs) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("part", PARTS)
def test_longer_and_shorter_answers_are_rejected_equally_often(part: str) -> None:
    pairs = records("preference", part)
    longer = sum(len(r["chosen"]) > len(r["rejected"]) for r in pairs)
    shorter = sum(len(r["chosen"]) < len(r["rejected"]) for r in pairs)
    assert abs(longer - shorter) <= 0.01 * len(pairs)
    assert 0.1 < (longer + shorter) / len(pairs) < 0.15


@pytest.mark.parametrize("part", PARTS)
def test_tones_are_never_the_point(part: str) -> None:
    """Where one line has two endings they are of one tone class."""
    table = json.loads((TANG / "tones.json").read_text(encoding="utf-8"))
    changed = [r for r in records("preference", part) if r["chosen"][:-2] == r["rejected"][:-2]]
    assert len(changed) > 0.3 * len(records("preference", part))
    for record in changed:
        both = {rhyme(record["chosen"]), rhyme(record["rejected"])}
        assert any(both <= set(group) for group in table.values())


def test_length_and_bigrams_do_not_tell_chosen_from_rejected() -> None:
    def answers(part: str) -> list[tuple[list[int], list[int]]]:
        return [([*map(ord, r["chosen"])], [*map(ord, r["rejected"])]) for r in records("preference", part)]

    classifier = PairClassifier.fit(answers("train"), vocab_size=0x10000)
    assert classifier.accuracy(answers("valid")) <= 0.6
    assert classifier.accuracy(answers("test")) <= 0.6


def test_every_character_has_one_tone_class() -> None:
    table = json.loads((TANG / "tones.json").read_text(encoding="utf-8"))
    classified = Counter("".join(table.values()))
    assert set(classified) == set("".join(map("".join, map(poems, PARTS)))) - set("，。")
    assert max(classified.values()) == 1
    assert [next(name for name in table if character in table[name]) for character in "天月看"] == list(table)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of 300 invented poems, some sharing lines, some irregular, with tone patterns."""
    characters = "山風日雲花春月水天秋江夜人不一何"

    def line(seed: int, length: int) -> str:
        return "".join(characters[(seed * 7 + i * i * (seed % 5 + 1)) % len(characters)] for i in range(length))

    texts = []
    for seed in range(300):
        length = 5 if seed % 2 else 7
        paragraphs = [f"{line(seed + k, length)}，{line(seed * 3 + k, length)}。" for k in range(2)]
        texts.append({"paragraphs": paragraphs if seed % 10 else ["短，句。"], "id": str(seed)})
    tones = [{"strains": [re.sub(r"\w", "平", p) for p in text["paragraphs"]], "id": text["id"]} for text in texts]
    for folder, content in (("quantangshi", texts), ("strains/json", tones)):
        path = tmp_path / "package" / "dist" / folder / "poet.tang.0.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "package"


def make(package: Path, out: Path, hash_seed: str) -> dict[str, bytes]:
    command = [sys.executable, str(SCRIPT), "--package", str(package), "--tasks", "40", str(out)]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": hash_seed})
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_script_makes_the_same_bytes_again(package: Path, tmp_path: Path) -> None:
    first, second = make(package, tmp_path / "a", "1"), make(package, tmp_path / "b", "2")
    assert first == second
    poems = first["train.txt"].decode()
    assert "短" not in poems
    assert poems.count("\n") > 20
    assert json.loads(first["tones.json"])["oblique"] == ""


def test_the_script_keeps_parts_apart_where_poems_share_lines(package: Path, tmp_path: Path) -> None:
    files = make(package, tmp_path / "out", "0")
    own = {part: set(re.findall(r"\w+", files[f"{part}.txt"].decode())) for part in PARTS}
    assert all(not own[a] & own[b] for a, b in OTHERS)


def test_the_script_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--package", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no regular verse" in done.stderr
