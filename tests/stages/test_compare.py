"""`framework compare`: what it prints of runs, of runs in progress and of pipelines, what it draws, what it refuses."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from framework.main import main
from framework.tracking.config import DIGEST
from framework.tracking.folder import RunFolder

RECIPE = {"stage": "sft", "seed": 0, "init_from": "base", "optim": {"lr": 0.1}, "train": {"steps": 9}}


def make(path: Path, lr: float = 0.1, finished: bool = True, drift: float = 0.0, **changes: object) -> Path:
    """Nine steps of a loss that `drift` bends from step 5 on; its digests say so."""
    recipe = {**RECIPE, "optim": {"lr": lr}, "run": {"dir": str(path)}, "tracking": {"every": 1}, **changes}
    folder = RunFolder.open(path, recipe, {"init_from": "aa"}, ignore=["tracking", "run"])
    for step in range(10 if finished else 7):
        loss = 5.0 - 0.25 * step + (drift if step >= 5 else 0.0)
        folder.log(step, {"train/loss": loss, "train/lr": 0.5, DIGEST: f"{step}-{loss}"})
    folder.advance(9 if finished else 6, 9)
    if finished:
        folder.finish({"stage": "sft", "figures": {"valid/loss": loss, "valid/loss/before": 5.0}})
    folder.close()
    return path


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_two_finished_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = make(tmp_path / "a"), make(tmp_path / "b", lr=0.2, drift=0.5)
    text = told(capsys, left, right, "--steps", "4")
    assert text.splitlines()[0] == f"{left} | {right}"
    assert "recipe\n  optim.lr: 0.1 | 0.2\n" in text
    assert "made with and from: the same" in text
    assert "weights: the same bits up to step 4, different at step 5" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "train/loss step 0 step 3 step 6 step 9 last lowest highest" in rows
    assert "left 5 4.25 3.5 2.75 2.75 2.75 at 9 5 at 0" in rows
    assert "right 5 4.25 4 3.25 3.25 3.25 at 9 5 at 0" in rows
    assert re.search(r"valid/loss +2.75 +3.25", text)
    assert "final figures equal: valid/loss/before" in text
    assert "curves equal at every common step: train/lr" in text


def test_equal_runs_are_called_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, make(tmp_path / "a"), make(tmp_path / "b"))
    assert "recipe: the same" in text
    assert "weights: the same bits at all 10 common steps, 0 to 9" in text
    assert "final figures equal: valid/loss, valid/loss/before" in text
    assert "curves equal at every common step: train/loss, train/lr" in text


def test_a_run_in_progress_is_compared_as_far_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, make(tmp_path / "a"), make(tmp_path / "b", finished=False))
    assert "attempt 1 | sft running, " in text
    assert "versions and commit are known once both have finished" in text
    assert "weights: the same bits at all 7 common steps, 0 to 6" in text


def test_what_changes_no_answer_stands_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bookkeeping, and a parent that lies elsewhere with the same content; a length does change it."""
    right = make(tmp_path / "b", tracking={"every": 2}, init_from="copy", train={"steps": 12})
    text = told(capsys, make(tmp_path / "a"), right)
    assert "recipe\n  train.steps: 9 | 12\nmade" in text
    assert "recipe, keys that change no answer\n  init_from: base | copy\n  tracking.every: 1 | 2\n" in text


def pipeline(root: Path, **stages: float) -> Path:
    """A folder of runs, one a stage, with their learning rates."""
    for name, lr in stages.items():
        make(root / name, lr)
    return root


def test_pipelines_are_compared_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = pipeline(tmp_path / "a", pretrain=0.1, sft=0.1), pipeline(tmp_path / "b", pretrain=0.1, sft=0.2)
    make(right / "ppo")
    text = told(capsys, left, right)
    first, second, rest = text.split("\n\n")
    assert first.splitlines()[0] == f"{left / 'pretrain'} | {right / 'pretrain'}"
    assert "recipe: the same" in first
    assert "optim.lr: 0.1 | 0.2" in second
    assert rest == f"without a counterpart: {right / 'ppo'}\n"


def test_the_page_holds_every_curve_and_needs_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page" / "compare.html"
    text = told(capsys, make(tmp_path / "a"), make(tmp_path / "b", lr=0.2, drift=0.5), "--html", page)
    assert text.splitlines()[-1] == str(page)
    html = page.read_text()
    assert html.count("<svg") == 2  # train/loss, train/lr
    assert html.count('class="line"') == 4
    assert "<code>optim.lr</code></td><td>0.1 | 0.2" in html
    assert "different at step 5" in html
    assert "http" not in html
    assert "<script" not in html


def test_folders_are_enough_and_torch_is_not_needed(tmp_path: Path) -> None:
    left, right = make(tmp_path / "a"), make(tmp_path / "b")
    code = (
        "import sys; from framework.main import main\n"
        f"assert main(['compare', {str(left)!r}, {str(right)!r}, '--html', {str(tmp_path / 'x.html')!r}]) == 0\n"
        "heavy = {'torch', 'ray', 'hydra', 'wandb'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the following arguments are required: RUN"),
        (["a"], "the following arguments are required: RUN"),
        (["a", "nowhere"], "nowhere is not a run folder: it has no status.json"),
        (["nowhere", "p"], "nowhere is not a run folder: it has no status.json"),
        (["a", "p"], "a is one run, the other a pipeline; name its stage: sft"),
        (["p", "a"], "a is one run, the other a pipeline; name its stage: sft"),
        (["p", "q"], "p and q have no stage in common: sft | ppo"),
        (["a", "torn"], "torn/status.json is not JSON"),
        (["a", "bare"], "bare is not a run folder: it has no config.yaml"),
        (["a", "a", "--steps", "0"], "--steps 0 must be at least 1"),
        (["a", "a", "--hmtl", "x"], "unrecognized arguments: --hmtl x"),
    ],
)
def test_wrong_folders_get_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a")
    pipeline(tmp_path / "p", sft=0.1)
    pipeline(tmp_path / "q", ppo=0.1)
    for name, text in (("torn", "{"), ("bare", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text(text)
    assert main(["compare", *words]) == 2
    printed = capsys.readouterr()
    assert line in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not printed.out
