"""A run folder as a stranger would break it: killed mid-line, started twice, continued with another recipe."""

import contextlib
import json
import math
import multiprocessing
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from framework.core.errors import FrameworkError, UsageError
from framework.tracking import folder
from framework.tracking.folder import RunFolder
from framework.tracking.status import read_status

RECIPE: dict[str, Any] = {
    "stage": "sft",
    "name": "sft",
    "seed": 3,
    "optim": {"lr": 1e-5},
    "train": {"steps": 10},
    "tracking": {"kind": "none", "every": 2},
}
IGNORE = ("tracking", "parallel", "run")


def opened(path: Path, parents: dict[str, str] | None = None, **changes: Any) -> RunFolder:
    return RunFolder.open(path, {**RECIPE, **changes}, parents or {"init_from": "aa"}, IGNORE)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def figures(step: int) -> dict[str, float]:
    return {"train/loss": 1 / step, "train/lr": 1e-5 * step}


def test_a_whole_life(tmp_path: Path) -> None:
    run = opened(tmp_path / "runs" / "sft")
    assert not run.is_finished
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == RECIPE
    for step in range(1, 11):
        run.log(step, figures(step))
        run.advance(step, 10)
    run.sample(10, {"prompt": "春", "response": "風"})
    run.finish({"stage": "sft", "figures": {"valid/loss": 2.0}})
    run.close()
    assert run.is_finished
    assert lines(run.path) == [{"step": s, **figures(s)} for s in range(1, 11)]
    assert "春" in (run.path / "samples.jsonl").read_text(encoding="utf-8")
    summary = run.summary
    assert (summary["figures"], summary["seed"], summary["world"], summary["attempts"]) == (
        {"valid/loss": 2.0},
        3,
        1,
        1,
    )
    assert summary["parents"] == {"init_from": "aa"}
    assert {"python", "torch", "framework"} <= set(summary["versions"])
    assert summary["seconds"] >= 0
    status = read_status(run.path)
    assert status is not None
    assert (status.state, status.step, status.total, status.attempt) == ("finished", 10, 10, 1)


def test_the_commit_is_the_checkouts(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    run = opened(tmp_path)
    run.finish({})
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert len(run.summary["commit"].removesuffix("-dirty")) == len(head.stdout.strip()) == 40


def test_figures_that_are_not_finite_are_null_for_every_reader(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.log(1, {"a": math.nan, "b": -math.inf, "c": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 1}\n'


def test_a_resumed_file_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole")
    for step in range(1, 11):
        whole.log(step, figures(step))
    for killed in range(1, 10):
        for restored in range(killed + 1):
            path = tmp_path / f"{killed}-{restored}"
            run = opened(path)
            for step in range(1, killed + 1):
                run.log(step, figures(step))
            with (path / "metrics.jsonl").open("a") as stream:
                stream.write('{"step": 1, "train/lo')  # the kill
            again = opened(path)
            again.cut_back(restored)
            for step in range(restored + 1, 11):
                again.log(step, figures(step))
            assert (path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()


def test_cut_back_keeps_several_lines_of_a_step_and_those_from_before_training(tmp_path: Path) -> None:
    run = opened(tmp_path)
    for step, name in [(0, "before"), (2, "train"), (2, "valid"), (4, "train")]:
        run.log(step, {name: 1.0})
        run.sample(step, {"response": name})
    run.cut_back(2)
    assert [line["step"] for line in lines(tmp_path)] == [0, 2, 2]
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 3
    run.cut_back(0)
    assert [line["step"] for line in lines(tmp_path)] == [0]
    run.cut_back(-1)
    assert lines(tmp_path) == []


def test_cut_back_survives_what_is_no_json(tmp_path: Path) -> None:
    run = opened(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('\n\n[]\n"x"\n{"a": 1}\nnonsense\n{"step": null}\n{"step": 1}\n{"step": 2}')
    run.cut_back(5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


# --- the same run, another run -------------------------------------------------------------------------------------


def test_the_same_recipe_continues_and_counts_attempts_and_time(tmp_path: Path) -> None:
    opened(tmp_path).advance(3, 10)
    first = read_status(tmp_path)
    run = opened(tmp_path, parallel={"data": 2}, run={"dir": "elsewhere"})
    second = read_status(tmp_path)
    assert first is not None
    assert second is not None
    assert (first.attempt, second.attempt, run.attempt) == (1, 2, 2)
    assert second.seconds >= first.seconds
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["parallel"] == {"data": 2}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "parents", "text"),
    [
        ({"optim": {"lr": 2e-5}}, None, r"\(optim.lr: 1e-05 there, 2e-05 now\)"),
        ({"seed": 4, "optim": {}}, None, r"\(optim.lr: 1e-05 there, None now; seed: 3 there, 4 now\)"),
        ({}, {"init_from": "bb"}, r"\(parents.init_from: aa there, bb now\)"),
        ({"train": {"steps": 5}}, None, r"\(train.steps: 10 there, 5 now\)"),
    ],
)
def test_another_recipe_is_refused_and_nothing_is_touched(
    tmp_path: Path, finished: bool, changes: dict[str, Any], parents: dict[str, str] | None, text: str
) -> None:
    run = opened(tmp_path)
    run.log(1, {"a": 1.0})
    if finished:
        run.finish({})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=text):
        opened(tmp_path, parents, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_finished_run_is_left_alone_and_a_raised_length_continues_it(tmp_path: Path) -> None:
    opened(tmp_path).finish({"figures": {"a": 1.0}})
    before = (tmp_path / "status.json").read_bytes()
    again = opened(tmp_path)
    assert again.is_finished
    assert again.summary["figures"] == {"a": 1.0}
    assert (tmp_path / "status.json").read_bytes() == before
    with pytest.raises(FrameworkError, match="is finished"):
        again.log(11, {})
    longer = opened(tmp_path, train={"steps": 20})
    assert not longer.is_finished
    longer.log(11, {"a": 1.0})
    longer.finish({})
    assert opened(tmp_path, train={"steps": 20}).is_finished
    with pytest.raises(UsageError, match=r"train.steps: 20 there, 10 now"):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "\tx"])
def test_a_config_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"config.yaml is not a recipe"):
        opened(tmp_path)


def test_a_torn_summary_does_not_count_as_finished(tmp_path: Path) -> None:
    opened(tmp_path).finish({})
    (tmp_path / "summary.json").write_text('{"digest": ')
    assert not opened(tmp_path).is_finished


# --- one writer ----------------------------------------------------------------------------------------------------


def test_a_leftover_attempt_cannot_write_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_STATUS_EVERY", 0.0)
    old = opened(tmp_path)
    old.log(1, figures(1))
    new = opened(tmp_path)
    new.advance(1, 10)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for write in (
        lambda: old.log(2, figures(2)), lambda: old.sample(2, {}), lambda: old.cut_back(0), lambda: old.finish({}),
        lambda: old.advance(2, 10), old.require_own,
    ):  # fmt: skip
        with pytest.raises(FrameworkError, match="attempt 1 is over"):
            write()
    old.fail(RuntimeError("x"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    new.log(2, figures(2))


def open_and_write(path: Path) -> None:
    run = opened(path)
    with contextlib.suppress(FrameworkError):
        run.log(run.attempt, {"a": 1.0})


def test_of_attempts_that_start_at_once_one_has_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_and_write, args=(tmp_path,)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(list(tmp_path.glob(".attempt-*"))) == 1
    steps = [line["step"] for line in lines(tmp_path)]
    assert len(steps) == len(set(steps))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path, RECIPE, {}, IGNORE, is_main=False)
    run.log(1, figures(1))
    run.sample(1, {})
    run.advance(1, 2)
    run.cut_back(0)
    run.finish({})
    run.fail(RuntimeError("x"))
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_told_in_the_status(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.advance(4, 10)
    run.fail(UsageError("the disk is full"))
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.last_error, status.eta_seconds) == ("failed", 4, "the disk is full", None)
    run.fail(KeyboardInterrupt(), state="interrupted")
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.last_error) == ("interrupted", "KeyboardInterrupt")


def test_log_files_are_by_role_and_rank(tmp_path: Path) -> None:
    assert opened(tmp_path).log_file("critic", 3) == tmp_path / "logs" / "critic-3.log"
    assert (tmp_path / "logs").is_dir()
