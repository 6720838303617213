"""`framework data check|prepare|stats` by its own words; what is prepared is what the stage then finds."""

import json
from pathlib import Path

import pytest

from framework.core.records import (
    ConversationSample,
    LabelledSample,
    Message,
    PreferenceSample,
    PromptSample,
    Sample,
    TextSample,
)
from framework.main import main
from framework.stages.data import text_of
from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.train import train

PAIR = {"instruction": "白日依山盡", "output": "黃河入海流"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    learned = train(iter(["白日依山盡黃河入海流" * 3]), TokenizerConfig(kind=TokenizerKind.CHARACTER, vocab_size=271))
    learned.save("tokenizer")
    return tmp_path


def write(name: str, *lines: object) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_check_names_every_bad_record_and_every_unknown_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("d/a.jsonl", PAIR, "{", PAIR, {"instruction": 1, "output": "x"}, [])
    write("d/b.json", '[{"text": "x"}, {"text": "y"}')
    write("d/c.jsonl", {"body": "x"})
    assert main(["data", "check", "d"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in out[:-1]] == [
        "d/c.jsonl:1",
        "d/a.jsonl:2",
        "d/a.jsonl:4",
        "d/a.jsonl:5",
        "d/a.jsonl",
        "d/b.json:2",
        "d/b.json",
    ]
    assert "d/a.jsonl: format alpaca, 2 samples, 3 bad records" in out
    assert out[-1] == "2 files, 4 samples, 5 errors"


def test_check_of_good_data_returns_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", PAIR)
    assert main(["data", "check", "a.jsonl", "corpora/tang/prompts.valid.jsonl"]) == 0
    assert capsys.readouterr().out.endswith("2 files, 251 samples, 0 errors\n")


def test_stats_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("zh.jsonl", PAIR, {"instruction": "白日", "output": "黃河"})
    write("en.jsonl", {"text": "The court held that the contract was void."})
    assert main(["data", "stats", "zh.jsonl", "en.jsonl", "--tokenizer", "tokenizer"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["zh.jsonl", "zh", "2", "16", "16"] in rows
    assert ["en.jsonl", "en", "1", "42", "42"] in rows
    lengths = {(row[0], row[2]): row[3] for row in rows if len(row) == 5 and row[1] == "to"}
    assert lengths == {("4", "7"): "1", ("8", "15"): "1", ("32", "63"): "1"}


def test_prepare_makes_what_the_stage_finds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer=tokenizer", "data.train=corpora/tang/valid.txt", "data.valid=0.2", "data.max_tokens=32"]
    words += ["batch.size=2", "tracking.progress=false", "device=cpu", "threads=1"]
    assert main(["data", "prepare", "pretrain", *words]) == 0
    made = {path: path.stat().st_mtime_ns for path in Path("runs/prepared").rglob("manifest.json")}
    assert len(made) == 2
    assert "«" in capsys.readouterr().out
    assert main(["pretrain", *words, "train.steps=1", "model=tiny", "model.num_layers=1"]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in Path("runs/prepared").rglob("manifest.json")}


SAYS: list[tuple[Sample, str]] = [
    (TextSample("t"), "t"),
    (ConversationSample((Message("user", "q"), Message("assistant", "a"))), "q\na"),
    (PreferenceSample((Message("user", "q"),), "c", "r"), "q\nc\nr"),
    (LabelledSample((Message("user", "q"),), "a", False), "q\na"),
    (PromptSample((Message("user", "q"),)), "q"),
]


@pytest.mark.parametrize(("sample", "text"), SAYS)
def test_what_a_sample_says(sample: Sample, text: str) -> None:
    assert text_of(sample) == text
