"""`parallel=zero…` as a user meets it: the same figures as DDP's in every stage, a killed run that ends in the same
bits, and what is said where DeepSpeed is missing."""

import importlib.abc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from framework.main import main
from tests.test_faults import fingerprints
from tests.tiny import PPO, WORDS, command, end, environment, fork, forked, model_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a policy and a reward model; prepared data come to stand beside them."""
    folder = tmp_path_factory.mktemp("zero")
    model_folders(folder)
    return folder


def pretrain(folder: Path, root: Path, *words: str) -> list[str]:
    """Eight steps on two CPU ranks, a checkpoint every second one."""
    tiny = [word.removeprefix("pretrain.") for word in WORDS if word.startswith("pretrain.")]
    common = [word for word in WORDS if "." not in word.split("=")[0] and not word.startswith("experiment")]
    common += [word for word in WORDS if word.startswith("tracking.")]
    places = [f"tokenizer={folder / 'policy'}", f"run.root={root}", f"data.cache={folder / 'prepared'}"]
    return ["pretrain", "experiment=quickstart/pretrain", *places, *common, *tiny, "cluster.workers=2", *words]


def figures(root: Path, stage: str = "pretrain") -> dict[str, float]:
    summary: dict[str, dict[str, float]] = json.loads((root / stage / "summary.json").read_text())
    return {name: value for name, value in summary["figures"].items() if "loss" in name or name == "train/grad_norm"}


def kill_after_a_checkpoint(words: Sequence[str], folder: Path) -> None:
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and not list(folder.glob("checkpoints/step_*/*.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()


def test_zero2_ends_where_ddp_ends_and_goes_on_after_a_kill(tmp_path: Path, folder: Path) -> None:
    forked(*pretrain(folder, tmp_path / "ddp", "parallel=ddp", "cluster.workers=1"), cwd=tmp_path)
    done = forked(*pretrain(folder, tmp_path / "zero2", "parallel=zero2"), cwd=tmp_path)
    said = done.stdout + done.stderr + (tmp_path / "zero2/pretrain/logs/pretrain-1.log").read_text()
    assert figures(tmp_path / "zero2") == pytest.approx(figures(tmp_path / "ddp"), rel=1e-4)
    assert "Warning" not in said
    assert "deepspeed" not in said.lower()
    words = pretrain(folder, tmp_path / "killed", "parallel=zero2")
    kill_after_a_checkpoint(words, tmp_path / "killed/pretrain")
    forked(*words, cwd=tmp_path)
    assert json.loads((tmp_path / "killed/pretrain/status.json").read_text())["attempt"] == 2
    assert fingerprints(tmp_path / "killed") == fingerprints(tmp_path / "zero2")


def test_ppo_in_one_process_trains_actor_and_critic_on_it(tmp_path: Path, folder: Path) -> None:
    """Two training engines and an inferring one, a process group of one, and every publication proven."""
    models = [f"init_from={folder / 'policy'}", f"reward_from={folder / 'reward'}"]
    lines = {}
    for layout in ("single", "zero3"):
        root = tmp_path / layout
        forked("ppo", *PPO, *models, f"run.dir={root}", f"parallel={layout}", "ppo.iterations=2", cwd=tmp_path)
        lines[layout] = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    for one, zero in zip(lines["single"], lines["zero3"], strict=True):
        for name in ("ppo/score/mean", "actor/grad_norm", "critic/grad_norm", "critic/value_loss"):
            assert zero.get(name) == pytest.approx(one.get(name), rel=1e-4)
    assert lines["zero3"][-1]["sync/canary_gap"] == 0.0


CORPUS = {"sft": "sft", "reward_model": "preference", "preference": "preference"}
NIGHTLY = [pytest.param("preference", layout, marks=pytest.mark.nightly) for layout in ("zero1", "zero2", "zero3")]


@pytest.mark.parametrize(("stage", "layout"), [("sft", "zero2"), ("reward_model", "zero3"), *NIGHTLY])
def test_other_stages_end_where_ddp_ends(stage: str, layout: str, tmp_path: Path, folder: Path) -> None:
    """Three steps and a validation on two ranks of DeepSpeed, against one process of torch."""
    parts = [f"data.train=[corpora/tang/{CORPUS[stage]}.valid.jsonl]", "data.valid=0.05"]
    words = [stage, f"init_from={folder / 'policy'}", *parts, f"data.cache={folder / 'prepared'}", "data.max_tokens=32"]
    words += ["train.steps=3", "optim.lr=1e-2", "batch.size=4", "tracking.every=1", "tracking.progress=false"]
    words += ["device=cpu", "threads=1", *(["dpo.beta=5"] if stage == "preference" else [])]
    log = tmp_path / "log"
    assert end(fork([*words, f"run.root={tmp_path / 'ddp'}", "parallel=ddp"], log), log)[0] == 0
    forked(*words, f"run.root={tmp_path / layout}", f"parallel={layout}", "cluster.workers=2", cwd=tmp_path)
    one, two = (figures(tmp_path / name, stage) for name in ("ddp", layout))
    assert len(one) > 2
    assert two == pytest.approx(one, rel=1e-5)
    assert one["valid/loss"] != pytest.approx(one["valid/loss/before"], rel=1e-4)  # it went somewhere


class Missing(importlib.abc.MetaPathFinder):
    """DeepSpeed, not installed."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return None


@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_where_deepspeed_is_missing_one_line_says_what_to_install(
    stage: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    models = [f"init_from={folder / 'policy'}", f"reward_from={folder / 'reward'}"]
    words = {
        "pretrain": pretrain(folder, tmp_path, "parallel=zero1"),
        "ppo": ["ppo", *PPO, *models, f"run.root={tmp_path}", "parallel=zero1"],
    }
    assert main(words[stage]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert 'pip install "framework[deepspeed]"' in line
    assert "parallel=fsdp" in line
    assert not (tmp_path / stage).exists()
