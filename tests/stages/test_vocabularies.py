"""`framework tokenizer train|extend|compare` by their own words."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from framework.main import compose, main
from framework.stages.config import TokenizerRun
from tests.tiny import model_folders

LINES = ["床前明月光，疑是地上霜。", "the moon, the frost", "emoji 👨‍👩‍👧 ▁"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a text, and wide enough a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("a.txt").write_text("\n".join(LINES) + "\n")
    return tmp_path


def cells(table: str, name: str) -> list[str]:
    (row,) = [line for line in table.splitlines() if f" {name} " in line]
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_train_is_the_plain_word_too() -> None:
    (plain,) = compose("tokenizer", ["data.train=a.txt", "tokenizer.vocab_size=300"])
    (verb,) = compose("tokenizer", ["train", "data.train=a.txt", "tokenizer.vocab_size=300"])
    assert plain == verb
    assert isinstance(verb, TokenizerRun)


def test_train_each_kind_and_compare_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("character", "bpe", "unigram", "wordpiece")
    quiet = ["device=cpu", "threads=1", "tracking.progress=false"]
    for kind in kinds:
        words = ["data.train=a.txt", f"tokenizer.kind={kind}", "tokenizer.vocab_size=340", f"name={kind}", *quiet]
        assert main(["tokenizer", "train", *words]) == 0
    capsys.readouterr()
    folders = ["runs/character", "runs/bpe/model", "runs/unigram", "runs/wordpiece"]
    assert main(["tokenizer", "compare", *folders, "--file", "a.txt"]) == 0
    table = capsys.readouterr().out
    characters, num_bytes = sum(map(len, LINES)), sum(len(line.encode()) for line in LINES)
    assert f"a.txt: 3 lines, {characters} characters, 10 of them Chinese" in table
    assert cells(table, "runs/character")[2:4] == ["1.000", "1.000"]
    assert cells(table, "runs/character")[4] == f"{num_bytes / characters:.3f}"
    for name in ("runs/character", "runs/bpe/model", "runs/unigram"):
        assert cells(table, name)[-2:] == ["0.00%", "0 of 3"]
    assert cells(table, "runs/wordpiece")[-1] == "1 of 3", "the moon , the frost"
    bpe = json.loads(Path("runs/bpe/summary.json").read_text())["figures"]
    assert cells(table, "runs/bpe/model")[4] == f"{bpe['bytes_per_token']:.3f}"


def test_extend_is_a_recipe_with_a_parent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Old ids stay in the folder that transformers loads; the run knows what it extended, and what it gained."""
    quiet = ["device=cpu", "threads=1", "tracking.progress=false"]
    Path("en.txt").write_text("the cat sat on the mat, that rat ran\n" * 9)
    Path("zh.txt").write_text("明月光，低頭思故鄉明月\n" * 9)
    old_words = ["train", "data.train=en.txt", "tokenizer.vocab_size=280", "name=old"]
    assert main(["tokenizer", *old_words, *quiet]) == 0
    Path("runs/old/model").rename("it's,old")
    words = ["extend", "it's,old", "data.train=zh.txt", "tokenizer.new_tokens=30", "name=new", *quiet]
    assert main(["tokenizer", *words]) == 0
    old, new = (AutoTokenizer.from_pretrained(f) for f in ("it's,old", "runs/new/model"))
    assert old.get_vocab().items() <= new.get_vocab().items()
    pieces = json.loads(Path("runs/new/sub_pieces.json").read_text())
    assert [int(i) for i in pieces] == list(range(len(old), len(new)))
    ids = new.encode("明月光 the", add_special_tokens=False)
    assert [j for i in ids for j in pieces.get(str(i), [i])] == old.encode("明月光 the", add_special_tokens=False)
    summary = json.loads(Path("runs/new/summary.json").read_text())
    assert summary["figures"]["new_tokens"] == len(new) - len(old) == len(pieces)
    assert summary["figures"]["bytes_per_token"] > 2 * summary["figures"]["bytes_per_token/before"]
    assert "init_from" in summary["parents"]
    assert main(["explain", "tokenizer", *words]) == 0
    assert "init_from: it's,old" in capsys.readouterr().out


def test_any_record_has_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"messages": [{"role": "user", "content": "月"}, {"role": "assistant", "content": "光光"}]}
    Path("b.jsonl").write_text(json.dumps(record) + "\n")
    assert main(["tokenizer", "train", "data.train=a.txt", "device=cpu", "threads=1", "tracking.progress=false"]) == 0
    assert main(["tokenizer", "compare", "runs/tokenizer", "--file", "b.jsonl"]) == 0
    assert "b.jsonl: 1 lines, 4 characters, 3 of them Chinese" in capsys.readouterr().out


def test_a_model_s_tokens_a_second_are_told_in_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the characters a token, twice the characters a second."""
    monkeypatch.chdir(tmp_path)
    policy, _ = model_folders(tmp_path)
    Path("a.txt").write_text("春風又綠江南岸\n明月何時照我還\n", encoding="utf-8")
    assert main(["tokenizer", "compare", policy, policy, "--file", "a.txt", "--model", policy]) == 0
    told = capsys.readouterr().out
    (speed,) = re.findall(r"writes ([\d,.]+) tokens a second here", told)
    characters = re.findall(r"^  ([\d,.]+) a second with", told, re.MULTILINE)
    (ratio, _) = (float(x) for x in re.findall(r"│ +[\d,]+ │ +(\d\.\d+) │", told))
    assert characters[0] == characters[1]
    numbers = [float(x.replace(",", "")) for x in (speed, characters[0])]
    assert numbers[1] * ratio == pytest.approx(numbers[0], rel=2e-3)
