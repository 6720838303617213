"""A rank that hangs, dawdles or dies ends the whole run with one line that says where every rank stands."""

import json
import subprocess
from pathlib import Path

import pytest

from framework.tokenization.config import TokenizerConfig, TokenizerKind
from framework.tokenization.train import train
from tests.test_local import local
from tests.tiny import framework

# What rank 1 of a run does in its second step before its update, or in its place.
CODE = """
import os, signal, sys, time
from framework.engine.flops import Work
from framework.engine.protocol import StepReport
from framework.engine.torch_engine import TorchEngine
whole = TorchEngine.step
def step(engine):
    if engine.step_count == 1 and os.environ.get("RANK") == "1":
        {}
    return whole(engine)
TorchEngine.step = step
"""
MISSING = "return StepReport(0.0, 0.0, True, Work())"
SLOW = "time.sleep(99)"
DEAD = "os.kill(os.getpid(), signal.SIGKILL)"
UPDATE = "the update of step 1, the sum of the gradient norm"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(iter(["abcdefgh"]), TokenizerConfig(kind=TokenizerKind.CHARACTER, vocab_size=300)).save(str(folder))
    return folder


def words(folder: Path, tokenizer: Path, deed: str) -> list[str]:
    (folder / "a.txt").write_text("abcdefgh\n" * 60)
    (folder / "deed.py").write_text(CODE.format(deed))
    return [
        "pretrain", f"tokenizer={tokenizer}", "data.train=[a.txt]", "data.max_tokens=8", "extensions=[deed.py]",
        "device=cpu", "model.hidden_size=8", "model.num_layers=1", "model.num_heads=1", "batch.size=12",
        "batch.micro_size=2", "train.steps=20", "run.dir=run", "tracking.progress=false", "cluster.deadline_s=4",
    ]  # fmt: skip


def check(done: subprocess.CompletedProcess[str], folder: Path, *parts: str) -> None:
    """One line on stderr with `parts` in order, and the same in status.json."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("framework pretrain: ")}
    at = 0
    for part in parts:
        assert part in line[at:], line
        at = line.index(part, at)
    status = json.loads((folder / "run/status.json").read_text())
    assert status["state"] == "failed"
    assert parts[-1] in status["last_error"]


@pytest.mark.parametrize(
    ("deed", "parts"),
    [
        (SLOW, ["rank 1 is past step 1", "deed.py:9 in step", "slow or stuck", f"ranks 0, 2 wait at {UPDATE} (waited"]),
        # It meets the others in another sum than theirs, and how soon that fails is gloo's affair.
        (MISSING, ["rank 1 waits at ", f"ranks 0, 2 wait at {UPDATE} ("]),
        (DEAD, ["pretrain rank 1, run failed: its process ended by SIGKILL; rank 1 has left or died; its last phase ",
                f"ranks 0, 2 wait at {UPDATE}"]),
    ],
)  # fmt: skip
def test_a_plain_command_names_the_rank_and_where_all_stand(
    tmp_path: Path, tokenizer: Path, deed: str, parts: list[str]
) -> None:
    done = framework(*words(tmp_path, tokenizer, deed), "cluster.workers=3", cwd=tmp_path, check=False)
    check(done, tmp_path, *parts)


@pytest.mark.nightly
def test_torchrun_too(tmp_path: Path, tokenizer: Path) -> None:
    done = local(*words(tmp_path, tokenizer, SLOW), cwd=tmp_path)
    check(done, tmp_path, "rank 1 is past step 1", f"rank 0 waits at {UPDATE}")
