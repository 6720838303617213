"""Law Resume, by real kills: a pipeline that is killed in every stage ends in the bits of one that was not.

The pipelines fork this process, which has imported everything already; a stage then takes a second or two.
"""

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.tiny import STAGES, WORDS, end, fork, forked

KILLED = ["pretrain", "sft", "reward_model", "ppo"]


def fingerprints(root: Path) -> dict[str, str]:
    """sha256 of every model of a pipeline, and of all that was measured on the way, speeds apart."""
    content = {p: p.read_bytes() for p in root.glob("*/model/*.safetensors")}
    content |= {p: measured(p).encode() for p in root.glob("*/metrics.jsonl")}
    return {str(p.relative_to(root)): hashlib.sha256(c).hexdigest() for p, c in sorted(content.items())}


def measured(path: Path) -> str:
    """metrics.jsonl without the figures that depend on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    clocked = ("tokens_per_second", "mfu_", "seconds")
    return json.dumps([{k: v for k, v in line.items() if not any(word in k for word in clocked)} for line in lines])


def stage_status(root: Path, stage: str) -> dict[str, object]:
    try:
        status: dict[str, object] = json.loads((root / stage / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return status


def stop_in(root: Path, stage: str, delay: float, number: int) -> int | None:
    """Start the pipeline, signal it `delay` seconds after `stage` has begun (or let it end); its exit code."""
    log = root.with_suffix(".log")
    attempt = stage_status(root, stage).get("attempt", 0)
    process = fork(["pipeline", *WORDS, f"run.dir={root}"], log)
    assert process.pid is not None
    deadline = time.monotonic() + 240
    while process.is_alive() and time.monotonic() < deadline:
        status = stage_status(root, stage)
        if status.get("state") == "running" and status.get("attempt") != attempt:
            time.sleep(delay)
            os.kill(process.pid, number)
            break
        time.sleep(0.005)
    code, said = end(process, log)
    assert "Traceback" not in said, said
    return code


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> dict[str, str]:
    prints = fingerprints(whole)
    for stage, count in (("pretrain", 9), ("sft", 9), ("reward_model", 9), ("ppo", 4)):  # from step 0 on
        assert (whole / stage / "metrics.jsonl").read_text().count("weights/digest") == count
    assert {name.split("/")[0] for name in prints if "safetensors" in name} == set(KILLED)
    return prints


def test_a_pipeline_killed_in_every_stage_ends_in_the_same_bits(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    delays = random.Random(0)
    for stage in KILLED:
        stop_in(tmp_path / "run", stage, delays.uniform(0.0, 0.7), signal.SIGKILL)
    forked("pipeline", *WORDS, f"run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert fingerprints(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_polite_stop_saves_says_so_and_continues(
    tmp_path: Path, undisturbed: dict[str, str], number: int, code: int
) -> None:
    root = tmp_path / "run"
    for stage in KILLED:
        returned = stop_in(root, stage, 0.05, number)
        assert returned in (code, 0), f"{stage}: {returned}"
        if returned == code:
            assert stage_status(root, stage)["state"] == "interrupted"
    forked("pipeline", *WORDS, f"run.dir={root}", cwd=tmp_path)
    assert fingerprints(root) == undisturbed


def test_a_finished_pipeline_is_skipped_and_another_recipe_there_is_refused(tmp_path: Path) -> None:
    words = [*WORDS, "stages=[quickstart/tokenizer,quickstart/pretrain]", f"run.dir={tmp_path / 'run'}"]
    words = [
        word for word in words if word.split(".")[0] in ("pretrain", "tokenizer") or word.split(".")[0] not in STAGES
    ]
    forked("pipeline", *words, cwd=tmp_path)
    before = fingerprints(tmp_path / "run")
    forked("pipeline", *words, cwd=tmp_path)
    assert fingerprints(tmp_path / "run") == before
    assert stage_status(tmp_path / "run", "pretrain")["attempt"] == 1
    refused = forked("pipeline", *words, "pretrain.optim.lr=1e-4", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "pretrain.optim.lr: 0.004 there, 0.0001 now" in refused.stderr


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(8))
def test_many_kills(tmp_path: Path, undisturbed: dict[str, str], seed: int) -> None:
    delays = random.Random(seed)
    for _ in range(3):
        for stage in KILLED:
            stop_in(tmp_path / "run", stage, delays.uniform(0.0, 1.5), signal.SIGKILL)
    forked("pipeline", *WORDS, f"run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert fingerprints(tmp_path / "run") == undisturbed
