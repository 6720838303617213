"""Whole stages on kernels, by the emulator, as a user runs them: figure by figure those of the references."""

import json
import subprocess
from pathlib import Path

import pytest

from framework.tasks.task import corpus_folder
from tests.tiny import command, environment, model_folders

TANG = corpus_folder("tang")
SFT = [f"data.train=[{TANG}/sft.valid.jsonl]", "data.max_tokens=48", "train.steps=3"]
PPO = [
    f"data.train=[{TANG}/prompts.valid.jsonl]", "reward_from=reward", "cluster=in_process", "ppo.iterations=1",
    "rollout.prompts=2", "rollout.samples=2", "rollout.max_tokens=6",
]  # fmt: skip
WORDS = ["init_from=policy", "device=cpu", "threads=1", "batch.size=4", "tracking.every=1"]


@pytest.mark.nightly
@pytest.mark.parametrize(("stage", "words"), [("sft", SFT), ("ppo", PPO)])
def test_emulated_a_stage_is_that_of_the_references(tmp_path: Path, stage: str, words: list[str]) -> None:
    model_folders(tmp_path)
    lines = {}
    for mode in ("emulator", "reference"):
        given = command(stage, *WORDS, *words, f"run.dir={mode}")
        subprocess.run(given, cwd=tmp_path, env=environment() | {"CUDA_EXT": mode}, check=True, timeout=280)
        lines[mode] = [json.loads(line) for line in (tmp_path / mode / "metrics.jsonl").read_text().splitlines()]
    assert len(lines["emulator"]) == len(lines["reference"]) > 0
    parts = ("train/", "actor/", "critic/", "ppo/", "sync/")
    for ours, theirs in zip(lines["emulator"], lines["reference"], strict=True):
        assert ours.keys() == theirs.keys()
        named = [name for name in theirs if name.startswith(parts) and "second" not in name]
        assert "train/loss" in named or "actor/grad_norm" in named
        for name in named:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    if stage == "ppo":
        assert lines["emulator"][-1]["actor/ratio_deviation"] == 0.0
