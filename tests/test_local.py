"""The same recipe under torchrun: two FSDP2 ranks end where one process ends; ppo says that it is not for torchrun."""

import json
import socket
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.test_bad_input import pretrain
from tests.tiny import WORDS, environment, forked

LOCAL = str(Path(__file__).resolve().parents[1] / "launch/local")


def local(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LOCAL, "2", *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=250, check=False
    )


def test_two_ranks_end_where_one_process_ends(tmp_path: Path) -> None:
    stages = ["stages=[quickstart/tokenizer]", f"run.dir={tmp_path / 'one'}"]
    forked("pipeline", *(w for w in WORDS if "." not in w.split("=")[0] or "tracking" in w), *stages, cwd=tmp_path)
    forked(*pretrain(tmp_path / "one", tmp_path / "one"), cwd=tmp_path)
    done = local(*pretrain(tmp_path / "two", tmp_path / "one", "parallel=fsdp"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seats = "rank 0 on cpu at shard 0, rank 1 on cpu at shard 1"
    node = f"pretrain: node {socket.gethostname()}: {seats}\n"
    assert done.stdout.startswith(f"pretrain: layout: fsdp = shard 2\n{node}")
    one, two = (load_file(tmp_path / name / "pretrain/model/model.safetensors") for name in ("one", "two"))
    scale = torch.cat([w.flatten() for w in one.values()]).square().mean().sqrt()
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() <= 1e-4 * max(weight.abs().max(), scale), name
    losses = [
        json.loads((tmp_path / n / "pretrain/summary.json").read_text())["figures"]["valid/loss"]
        for n in ("one", "two")
    ]
    assert abs(losses[0] - losses[1]) < 1e-4


def test_a_world_that_the_layout_cannot_fill_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    done = local("pretrain", "tokenizer=t", "data.train=[a.txt]", "device=cpu", "parallel=single", cwd=tmp_path)
    assert done.returncode != 0
    assert "parallel=single runs on one process" in done.stderr


def test_ppo_is_not_for_torchrun(tmp_path: Path) -> None:
    done = local("ppo", "init_from=a", "reward_from=b", "data.train=[p.jsonl]", cwd=tmp_path)
    assert done.returncode != 0
    assert "ppo is run by one controller, not under torchrun" in done.stderr
