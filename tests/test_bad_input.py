"""Broken checkpoints, NaN, a full disk, a dying worker: one clear line, right exit code. Wrong words, data and folders
stand in `test_wrong_uses`."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.tiny import WORDS, command, environment, forked


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with all models of the quickstart, tiny."""
    folder = tmp_path_factory.mktemp("trained")
    forked("pipeline", *WORDS, f"run.dir={folder / 'run'}", cwd=folder)
    return folder / "run"


def pretrain(folder: Path, trained: Path, *words: str) -> list[str]:
    tiny = [word.removeprefix("pretrain.") for word in WORDS if word.startswith("pretrain.")]
    common = [word for word in WORDS if "." not in word.split("=")[0] and not word.startswith("experiment")]
    tokenizer = f"tokenizer={trained / 'tokenizer/model'}"
    return ["pretrain", "experiment=quickstart/pretrain", tokenizer, f"run.root={folder}", *common, *tiny, *words]


def test_a_nan_stops_the_run_with_one_line(tmp_path: Path, trained: Path) -> None:
    done = forked(*pretrain(tmp_path, trained, "optim.lr=1e30", "optim.clip=0"), cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "lower optim.lr, or pass over such steps: engine.non_finite=skip" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "pretrain/status.json").read_text())["state"] == "failed"


def test_a_flipped_byte_falls_back_to_the_checkpoint_before(tmp_path: Path, trained: Path) -> None:
    words = pretrain(tmp_path, trained, "checkpoint.keep=4")
    forked(*words, cwd=tmp_path)
    before = (tmp_path / "pretrain/model/model.safetensors").read_bytes()
    (tmp_path / "pretrain/summary.json").unlink()
    newest = max((tmp_path / "pretrain/checkpoints").glob("step_*"))
    weights = next(newest.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    done = forked(*words, cwd=tmp_path)
    assert f"warning: checkpoint {newest.name} is not used" in done.stderr
    assert (tmp_path / "pretrain/model/model.safetensors").read_bytes() == before


def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(tmp_path: Path, trained: Path) -> None:
    """A file-size limit of 64 KiB stands in for the disk: no checkpoint of this model fits."""
    words = " ".join(
        f"'{word}'" for word in command(*pretrain(tmp_path, trained, f"data.cache={trained / 'prepared'}"))
    )
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 64; exec {words}"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot save step 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "pretrain/checkpoints").glob("*"))


def test_a_dying_ray_worker_is_named_and_nothing_hangs(tmp_path: Path, trained: Path) -> None:
    words = [word.removeprefix("ppo.") for word in WORDS if word.startswith("ppo.") and "cluster" not in word]
    folders = [f"init_from={trained / 'sft/model'}", f"reward_from={trained / 'reward_model/model'}"]
    process = subprocess.Popen(
        command("ppo", "experiment=quickstart/ppo", f"run.root={tmp_path}", *folders, "device=cpu", *words,
                "ppo.iterations=1000", "tracking.progress=false"),
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = tmp_path / "ppo/metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
    victims = ray_workers(tmp_path)
    assert len(victims) >= 5, "five roles, five workers"
    os.kill(victims[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    assert re.search(r"(actor|critic|reference|reward|generator) rank 0", output), output
    assert "Traceback" not in output
    assert not ray_workers(tmp_path), "nothing of Ray is left"


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def ray_workers(folder: Path) -> list[int]:
    """Living Ray actors whose driver was started in `folder`."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if title(pid).startswith("ray::") and working_folder(pid) == str(folder)]


def working_folder(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""
