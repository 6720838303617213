"""Each tracker for real: event files that tensorboard reads, an offline wandb run that continues, a missing package."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from framework.core import registry
from framework.core.errors import UsageError
from framework.core.registry import register
from framework.tracking import tracker
from framework.tracking.config import TrackingConfig
from framework.tracking.folder import RunFolder
from framework.tracking.tracker import open_tracker
from tests.journals import swanlab_attempts, wandb_attempts


def run(path: Path, kind: str, steps: range, final: float | None = None) -> RunFolder:
    """An attempt that logs `steps`, and finishes where it has a `final` figure."""
    folder = RunFolder.open(path, {"name": "try", "tracking": {"kind": kind, "group": "g"}})
    folder.cut_back(steps.start - 1)
    for step in steps:
        folder.log(step, {"train/loss": 1.0 / step, "odd": float("nan")})
    if final is not None:
        folder.finish({"figures": {"valid/loss": final}})
    folder.close()
    if kind == "wandb":  # its files are whole once its service has ended, as it does with the process
        sys.modules["wandb"].teardown()
    return folder


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's settings for wandb or swanlab."""
    for name in os.environ:
        if name.startswith(("WANDB_", "SWANLAB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "none"))


def test_an_unknown_kind_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown tracker 'wanbd': did you mean 'wandb'"):
        open_tracker(tmp_path, TrackingConfig(kind="wanbd"), {})


@pytest.mark.parametrize(
    ("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("swanlab", "swanlab")]
)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf'pip install "framework\[{kind}\]"'):
        RunFolder.open(tmp_path, {"tracking": {"kind": kind}})


def test_an_extension_may_bring_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Listening:
        def __init__(self, folder: Path, config: TrackingConfig, recipe: Mapping[str, Any]):
            seen.append((folder, config.group, recipe["name"]))

        def log(self, step: int, figures: Mapping[str, float]) -> None:
            seen.append((step, dict(figures)))

        def finish(self, figures: Mapping[str, float]) -> None:
            seen.append(dict(figures))

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setitem(registry._entries, "tracker", dict(registry._entries["tracker"]))
    register("tracker", "listening")(Listening)
    folder = run(tmp_path, "listening", range(1, 2))
    folder.close()
    assert seen == [(tmp_path, "g", "try"), (1, {"train/loss": 1.0}), "closed"]


def test_the_final_figures_reach_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(tracker.NoTracker, "finish", lambda self, figures: seen.append(figures))
    RunFolder.open(tmp_path, {}).finish({"figures": {"a": 1.0, "b": float("inf")}})
    assert seen == [{"a": 1.0}]


def test_tensorboard_files_hold_the_figures_and_a_resume_hides_what_it_does_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, "tensorboard", range(1, 6))
    run(tmp_path, "tensorboard", range(4, 8))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([1 / s for s in range(1, 8)])


def test_two_attempts_are_one_wandb_run_with_our_steps_as_its_axis(tmp_path: Path, no_account: None) -> None:
    pytest.importorskip("wandb")
    run(tmp_path, "wandb", range(1, 4))
    run(tmp_path, "wandb", range(3, 6), final=2.0)
    first, second = wandb_attempts(tmp_path)
    assert first.run_id == second.run_id == (tmp_path / "wandb_id").read_text()
    assert first.group == second.group == "g"
    assert first.axes == second.axes == {"*": "step"}
    assert first.points == [(step, "train/loss", pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert second.points == [(step, "train/loss", pytest.approx(1 / step)) for step in (3, 4, 5)]
    assert second.summary["train/loss"] == pytest.approx(1 / 5)
    assert second.summary["final/valid/loss"] == 2.0


def test_a_sweep_s_agent_chooses_the_id(tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen42")
    run(tmp_path, "wandb", range(1, 2))
    monkeypatch.setenv("WANDB_RUN_ID", "another7")
    run(tmp_path, "wandb", range(2, 3))
    assert [attempt.run_id for attempt in wandb_attempts(tmp_path)] == ["chosen42", "chosen42"]


def test_two_attempts_are_one_swanlab_run_with_our_steps(tmp_path: Path, no_account: None) -> None:
    pytest.importorskip("swanlab")
    run(tmp_path, "swanlab", range(1, 4))
    run(tmp_path, "swanlab", range(3, 6), final=2.0)
    first, second = swanlab_attempts(tmp_path)
    assert first.run_id == second.run_id == (tmp_path / "swanlab_id").read_text()
    assert first.group == second.group == "g"
    assert first.points == [(step, "train/loss", pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert second.points[:-1] == [(step, "train/loss", pytest.approx(1 / step)) for step in (3, 4, 5)]
    assert second.points[-1] == (5, "final/valid/loss", 2.0)


def test_a_swanlab_that_cannot_start_is_one_line(
    tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "online")
    with pytest.raises(UsageError, match=r"tracking=swanlab cannot start: .*; SWANLAB_MODE=offline goes without"):
        run(tmp_path, "swanlab", range(1, 2))


@pytest.mark.parametrize(
    ("environment", "content", "expected"),
    [
        ({}, "", False),
        ({"WANDB_API_KEY": "x" * 40}, "", True),
        ({}, "machine api.wandb.ai login user password secret", True),
        ({}, "machine elsewhere.org login user password secret", False),
        ({"WANDB_BASE_URL": "https://wandb.our.lab"}, "machine wandb.our.lab login user password secret", True),
        ({}, "machine machine machine", False),
    ],
)
def test_an_account_is_found_where_wandb_looks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], content: str, expected: bool
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(content)
    for name, value in ({"NETRC": str(tmp_path / "netrc")} | environment).items():
        monkeypatch.setenv(name, value)
    assert tracker._has_account() is expected
