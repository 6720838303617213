"""The benchmarks run, and all rivals do the same work; tiny sizes, and no speed is looked at."""

import functools
import json
from pathlib import Path

import pytest

from framework.tokenization.config import TokenizerKind
from tests.benchmarks import (
    adapting,
    contest,
    layouts,
    memory,
    model,
    preparation,
    saving,
    sft,
    startup,
    step,
    tokenizer,
)
from tests.benchmarks.contest import Lap, Laps, Pledge, Run
from tests.benchmarks.material import long_conversations, write_records


class Over(Exception):
    """A contestant has done what was asked of it."""


class Once(Laps):
    """The line of a contestant that runs in this process, up to the end of its first lap."""

    def __init__(self) -> None:
        self.pledge, self.lap = Pledge(), (0, 0)

    def ready(self, equal: object = None, close: object = None) -> None:
        self.pledge = Pledge(equal or {}, close or {})  # type: ignore[arg-type]

    def done(self, trained: int, read: int) -> None:
        self.lap = (trained, read)
        raise Over


def run_once(contestants: dict[str, Run], place: Path) -> list[Once]:
    """Every contestant's first lap; none may do other work than the first."""
    lines = []
    for number, (name, run) in enumerate(contestants.items()):
        own = place / f"contestant-{number}"
        own.mkdir()
        lines.append(Once())
        with pytest.raises(Over):
            run(own, lines[-1])
        contest._agree(name, lines[-1].pledge, lines[0].pledge)
    return lines


@pytest.fixture
def task(tmp_path: Path) -> sft.Task:
    sizes = {"rounds": 1, "steps": 1, "rows": 2, "max_tokens": 32, "width": 16, "layers": 1, "threads": 1}
    args = contest.options("", [], **sizes, samples=40)
    return sft.prepared(tmp_path, args)


def test_trainers_start_at_one_loss_and_train_the_same_tokens(task: sft.Task) -> None:
    lines = run_once(sft.contestants(task), task.place)
    assert lines[0].pledge.equal["trained tokens an epoch"] == lines[-1].pledge.equal["trained tokens an epoch"] > 200
    assert all(0 < trained < read for trained, read in (line.lap for line in lines))


def test_the_bare_loop_does_our_steps(task: sft.Task) -> None:
    lines = run_once(step.contestants(task), task.place)
    assert len({line.lap for line in lines}) == 1


@pytest.mark.parametrize("kind", preparation.OPEN_ROWS)
def test_both_ways_to_prepare_make_the_same_tokens(task: sft.Task, kind: str) -> None:
    file = write_records(task.place / f"{kind}.jsonl", preparation.records(kind, kilobytes=20))
    lines = run_once(preparation.contestants(preparation.Task(task.model, file, kind, 1, 1024)), task.place)
    assert len({line.lap for line in lines}) == 1
    assert lines[0].lap[1] > 3000


@pytest.mark.parametrize("kind", [TokenizerKind.BPE, TokenizerKind.WORDPIECE, TokenizerKind.UNIGRAM])
def test_tokenizers_learn_the_same_text(tmp_path: Path, kind: TokenizerKind) -> None:
    place = tokenizer.Task(tmp_path / "text.txt", vocabulary=5000)
    tokenizer.write_text(place.file, kilobytes=30)
    lines = run_once(tokenizer.contestants(place, kind), tmp_path)
    assert {line.lap for line in lines} == {(place.file.stat().st_size // 1000, 0)}


def test_checkpoints_and_torch_s_files_hold_the_same_bytes(tmp_path: Path) -> None:
    for title, rivals in saving.contestants(saving.Task(width=16, layers=1, threads=1)).items():
        (tmp_path / title).mkdir()
        lines = run_once(rivals, tmp_path / title)
        assert len({line.lap for line in lines}) == 1
        assert lines[0].pledge.equal["bytes"] > 3 * 4 * 8192 * 16


@pytest.mark.parametrize("layout", ["tp", "zero3"])
def test_loops_in_one_layout_end_at_one_loss(tmp_path: Path, layout: str) -> None:
    task = layouts.Task(width=16, layers=2, vocab=64, rows=4, places=16, steps=1, threads=1)
    raced = contest.compete(layouts.contestants(task, layout), tmp_path, rounds=1)
    assert 3 < raced.pledge.close["loss after two updates"] < 6
    assert {lap.trained for laps in raced.laps.values() for lap in laps} == {64}


def test_a_model_and_its_rival_say_one_loss_and_write_one_text(tmp_path: Path) -> None:
    sizes = {"width": 16, "layers": 1, "vocab": 64, "rows": 2, "places": 16, "steps": 1, "new": 8, "threads": 1}
    task = model.Task(folder=tmp_path / "model", **sizes)
    task.write()
    for title, rivals in model.contests(task).items():
        if "compiled" not in title:
            (tmp_path / title).mkdir()
            lines = run_once(rivals, tmp_path / title)
            assert len({line.lap for line in lines}) == 1


def test_what_learns_less_says_the_same_loss_and_keeps_fewer_moments(tmp_path: Path) -> None:
    task = memory.Task(width=64, layers=2, vocabulary=64, rows=2, length=16, micros=1, steps=1)
    ways = {way: functools.partial(adapting.run, task=task, way=way, threads=1) for way in adapting.WAYS}
    assert len({line.lap for line in run_once(ways, tmp_path)}) == 1
    everything, half, last, adapter = (adapting.moments(task, way) for way in adapting.WAYS)
    assert everything > half >= last > adapter > 0


def test_samples_of_the_large_file_differ() -> None:
    made = [json.dumps(record) for record in long_conversations(kilobytes=30)]
    assert len(set(made)) == len(made) > 24


def test_a_rival_that_does_other_work_is_found_out() -> None:
    ours = Pledge({"ids": 3}, {"loss": 2.0})
    with pytest.raises(AssertionError, match="theirs"):
        contest._agree("theirs", Pledge({"ids": 4}, {"loss": 2.0}), ours)
    with pytest.raises(AssertionError, match="theirs"):
        contest._agree("theirs", Pledge({"ids": 3}, {"loss": 2.001}), ours)
    contest._agree("theirs", Pledge({"ids": 3}, {"loss": 2.0001}), ours)


def test_factors_are_taken_round_by_round() -> None:
    ours, theirs = [(1.0, 1.0), (4.0, 1.0)], [(2.0, 2.0), (8.0, 4.0)]
    laps = {name: [Lap(*times, 10, 0) for times in own] for name, own in (("ours", ours), ("theirs", theirs))}
    result = contest.Contest(laps, Pledge())
    assert result.ratios("theirs") == [2.0, 2.0]
    assert result.ratios("theirs", "busy") == [2.0, 4.0]


def test_ranks_take_about_the_memory_that_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "LAYOUTS", {name: memory.LAYOUTS[name] for name in ("single", "fsdp")})
    sizes = ["--width", "128", "--layers", "2", "--vocabulary", "4096", "--length", "256"]
    memory.main([*sizes, "--out", str(tmp_path / "bench.json")])
    single, fsdp = json.loads((tmp_path / "bench.json").read_text())["Memory"]["layouts"]
    assert fsdp["formula"]["weights"] * 2 == single["formula"]["weights"]
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["single", "fsdp"]
    assert all(0.7 < float(row[-1]) < 1.4 for row in rows)


def test_real_rivals_race_and_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    startup.main(["--rounds", "1", "--out", str(tmp_path / "bench.json")])
    laps = json.loads((tmp_path / "bench.json").read_text())["Starting"]["laps"]
    assert set(laps) == set(startup.COMMANDS)
    assert all(len(own) == 1 and own[0]["seconds"] > 0 for own in laps.values())
    assert "ours is faster by the factor" in capsys.readouterr().out
