"""Runs as their users watch them, in processes of their own: at wandb, beside each other, and under a sweep's agent."""

import json
import os
import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.core.config import recipes_folder
from framework.main import compose
from tests.journals import wandb_attempts
from tests.tiny import WORDS, forked

STAGES = ("tokenizer", "pretrain")
SWEEPS = ("sft", "reward_model", "ppo")
TINY = ["device=cpu", "threads=1", "tracking.every=1", "tracking.progress=false", "train.steps=8", "batch.micro_size=4",
        "data.train=[corpora/tang/sft.valid.jsonl]", "data.valid=0.05", "evaluation.limit=4"]  # fmt: skip


def pipeline(root: Path, *words: str) -> None:
    """The first two stages of the tiny quickstart."""
    ours = [word for word in WORDS if word.split(".")[0] not in ("sft", "reward_model", "ppo", "evaluate")]
    stages = ",".join(f"quickstart/{stage}" for stage in STAGES)
    forked("pipeline", *ours, f"stages=[{stages}]", f"run.dir={root}", *words, cwd=root.parents[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """runs/quickstart, tracked by wandb without an account; `other` beside it learns at another rate."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        root = tmp_path_factory.mktemp("watching") / "runs/quickstart"
        root.mkdir(parents=True)
        pipeline(root, "tracking=wandb")
        pipeline(root.parent / "other", "pretrain.optim.lr=2e-3")
        yield root


def test_the_stages_of_a_pipeline_are_runs_of_one_group(root: Path) -> None:
    attempts = [wandb_attempts(root / stage) for stage in STAGES]
    assert [len(found) for found in attempts] == [1, 1]
    assert {found[0].group for found in attempts} == {"quickstart"}
    assert len({found[0].run_id for found in attempts}) == 2
    assert not (root / "wandb_id").exists(), "the pipeline itself is no run there"
    (pretrain,) = attempts[1]
    logged = [json.loads(line) for line in (root / "pretrain/metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["train/loss"]) for line in logged if "train/loss" in line]
    assert [(step, value) for step, name, value in pretrain.points if name == "train/loss"] == losses
    assert not any("digest" in name for _, name, _ in pretrain.points), "trackers get numbers"
    figures = json.loads((root / "pretrain/summary.json").read_text())["figures"]
    assert pretrain.summary["final/valid/loss"] == figures["valid/loss"]


def test_a_group_of_one_s_own_is_kept() -> None:
    members = compose("pipeline", ["experiment=quickstart", "tracking.group=mine"])
    assert {member.tracking.group for member in members} == {"mine"}


def test_a_longer_run_continues_the_same_run_at_wandb(root: Path) -> None:
    words = [word.removeprefix("pretrain.") for word in WORDS if word.startswith(("pretrain.", "threads", "tracking"))]
    forked("pretrain", "experiment=quickstart/pretrain", *words, f"run.root={root}", "tracking=wandb",
              "device=cpu", "train.steps=10", cwd=root.parents[1])  # fmt: skip
    first, second = wandb_attempts(root / "pretrain")
    assert first.run_id == second.run_id
    assert [step for step, name, _ in second.points if name == "train/loss"] == [9, 10]


def test_two_pipelines_are_compared_stage_by_stage(root: Path) -> None:
    told = forked("compare", "runs/quickstart", "runs/other", "--html", "both.html", cwd=root.parents[1]).stdout
    tokenizer, pretrain, _ = told.split("\n\n")
    assert "recipe: the same" in tokenizer
    assert "final figures equal: vocab_size, bytes_per_token" in tokenizer
    assert "  optim.lr: 0.004 | 0.002" in pretrain
    assert "made with and from: the same" in pretrain
    assert "weights: the same bits up to step 0, different at step 1" in pretrain
    assert (root.parents[1] / "both.html").read_text().count("<svg") > 4


# --- sweeps under wandb's own agent ----------------------------------------------------------------------------------


def agent_runs(sweep: dict[str, Any], args: dict[str, Any], run_id: str, patch: pytest.MonkeyPatch) -> Any:
    """What wandb's agent starts when its server hands it this run: an AgentProcess."""
    wandb_agent = pytest.importorskip("wandb.wandb_agent")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR"):
        patch.setenv(name, "")  # the agent writes them into its own environment; the patch takes them back
    patch.setenv("WANDB_DIR", os.getcwd())
    patch.setenv("WANDB_SWEEP_ID", "sweep123")
    agent = wandb_agent.Agent(None, queue.Queue(), "sweep123")
    agent._sweep_command = list(sweep["command"])
    values = {name: {"value": value} for name, value in args.items()}
    agent._command_run({"run_id": run_id, "program": sweep["program"], "args": values})
    return agent._run_processes[run_id]


def load(name: str) -> dict[str, Any]:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep: dict[str, Any] = utils.load_sweep_config(str(recipes_folder() / f"sweep/{name}.yaml"))
    return sweep


def drawn(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs in which both ends of every range and each listed value come up."""
    values = {n: p["values"] if "values" in p else [p["min"], p["max"]] for n, p in sweep["parameters"].items()}
    return [{n: v[i % len(v)] for n, v in values.items()} for i in range(max(map(len, values.values())))]


class Recorded:
    """Stands for AgentProcess: keeps what would have been started."""

    def __init__(self, env: dict[str, str], command: list[str], forward_signals: bool):
        self.env, self.command = env, command


@pytest.mark.parametrize("name", SWEEPS)
def test_what_an_agent_starts_composes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wandb.wandb_agent.AgentProcess", Recorded)
    sweep, folders = load(name), set()
    for number, args in enumerate(drawn(sweep)):
        process = agent_runs(sweep, args, f"run{number}", monkeypatch)
        assert process.command[:2] == ["framework", name]
        assert process.env["WANDB_RUN_ID"] == f"run{number}"
        monkeypatch.setenv("WANDB_RUN_ID", f"run{number}")
        (config,) = compose(process.command[1], process.command[2:])
        for key, value in args.items():
            there: Any = config
            for part in key.split("."):
                there = getattr(there, part)
            assert there == value, key
        assert config.tracking.kind == "wandb"
        folders.add(config.run.dir)
    assert len(folders) == len(drawn(sweep)) > 1, "every run of a sweep has its own folder"


def test_an_agent_s_run_trains_and_reports_to_its_sweep(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = root.parents[1]
    command = here / "bin/framework"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m framework.main "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(here)
    sweep = load("sft")
    sweep["command"] += TINY
    process = agent_runs(sweep, {"optim.lr": 1e-3, "batch.size": 8}, "abcd1234", monkeypatch)
    assert process.wait() == 0
    folder = here / "runs/sweep/sft-abcd1234"
    (attempt,) = wandb_attempts(folder)
    assert attempt.run_id == "abcd1234"
    figures = json.loads((folder / "summary.json").read_text())["figures"]
    assert attempt.summary[sweep["metric"]["name"]] == figures["valid/loss"]
