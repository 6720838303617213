"""The quickstart shortened for tests: the same stages, corpus and code, a model of a few thousand parameters."""

import os
import subprocess
import sys
from pathlib import Path

WORDS = [
    "experiment=quickstart",
    "device=cpu",
    "threads=1",
    "tracking.every=1",
    "tracking.digest_every=1",
    "tracking.progress=false",
    "pretrain.model.hidden_size=32",
    "pretrain.model.num_layers=1",
    "pretrain.model.num_heads=2",
    "pretrain.train.steps=8",
    "pretrain.train.validate_every=4",
    "pretrain.batch.size=4",
    "pretrain.evaluation.limit=4",
    "pretrain.evaluation.baselines=false",
    "sft.train.steps=8",
    "sft.batch.size=4",
    "sft.evaluation.limit=4",
    "reward_model.train.steps=8",
    "reward_model.batch.size=4",
    "reward_model.evaluation.baselines=false",
    "ppo.cluster=in_process",
    "ppo.ppo.iterations=3",
    "ppo.ppo.epochs=1",
    "ppo.rollout.prompts=4",
    "ppo.rollout.samples=2",
    "ppo.batch.size=4",
    "ppo.evaluation.limit=4",
    "ppo.evaluation.samples=2",
    "evaluate.evaluation.limit=4",
    *(f"{stage}.checkpoint.every=2" for stage in ("pretrain", "sft", "reward_model")),
    "ppo.checkpoint.every=1",
]
STAGES = ["tokenizer", "pretrain", "sft", "reward_model", "ppo", "evaluate"]


def command(*words: str) -> list[str]:
    """`framework WORDS...` as a user's shell would start it."""
    return [sys.executable, "-m", "framework.main", *words]


def environment() -> dict[str, str]:
    """The test's own environment, without anything that would speak to a network or a terminal."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}


def framework(*words: str, cwd: Path, timeout: float = 280, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; with `check` a failure shows what it printed."""
    done = subprocess.run(
        command(*words), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
