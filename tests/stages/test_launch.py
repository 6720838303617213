"""A plain training command on several ranks of this machine: the same answer, the map first, signals, errors."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framework.cluster.config import ClusterKind
from framework.core import runtime
from framework.core.errors import UsageError
from framework.main import compose
from framework.stages import launch as room
from framework.stages.config import PpoRun, TrainingRun
from tests.test_bad_input import pretrain
from tests.tiny import command, environment, forked


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a model that one process trained."""
    folder = tmp_path_factory.mktemp("one")
    forked("tokenizer", "experiment=quickstart/tokenizer", f"run.root={folder}", cwd=folder)
    done = forked(*pretrain(folder, folder), cwd=folder)
    assert done.stdout.startswith("pretrain: layout: ddp = one process\npretrain: rank 0 on cpu\n")
    return folder


def test_two_ranks_end_where_one_process_ends(tmp_path: Path, trained: Path) -> None:
    done = forked(*pretrain(tmp_path, trained, "cluster.workers=2"), cwd=tmp_path)
    seats = "rank 0 on cpu at replicate 0, rank 1 on cpu at replicate 1"
    assert done.stdout.startswith(f"pretrain: layout: ddp = replicate 2\npretrain: {seats}\n")
    one, two = (load_file(folder / "pretrain/model/model.safetensors") for folder in (trained, tmp_path))
    scale = torch.cat([w.flatten() for w in one.values()]).square().mean().sqrt()
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() <= 1e-4 * max(weight.abs().max(), scale), name
    summary = json.loads((tmp_path / "pretrain/summary.json").read_text())
    assert summary["world"] == 2
    assert (tmp_path / "pretrain/logs/pretrain-1.log").exists()


def test_a_signal_to_the_command_saves_on_all_ranks_and_the_command_continues(tmp_path: Path, trained: Path) -> None:
    quiet = ["train.validate_every=0", "evaluation.tasks=[]"]
    words = pretrain(tmp_path, trained, *quiet, "cluster.workers=2", "train.steps=100", "checkpoint.every=0")
    process = subprocess.Popen(
        command(*words), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "pretrain/metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and '"step": 3' in metrics.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors
    assert "the same command continues from here" in errors
    assert "Traceback" not in errors
    assert 3 <= json.loads((tmp_path / "pretrain/status.json").read_text())["step"] < 100
    forked(*words, cwd=tmp_path)
    assert json.loads((tmp_path / "pretrain/summary.json").read_text())["attempts"] == 2


def test_an_error_of_all_ranks_is_one_line(tmp_path: Path, trained: Path) -> None:
    words = pretrain(tmp_path, trained, "cluster.workers=2", "data.train=[nothing.txt]")
    done = forked(*words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == "framework pretrain: data.train: nothing.txt: no such file or folder\n"


def recipe(*words: str) -> TrainingRun:
    (config,) = compose("sft", ["init_from=base", "data.train=[a.jsonl]", *words])
    assert isinstance(config, TrainingRun)
    return config


def test_every_visible_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert room.device_map(recipe()) == [f"cuda:{rank} (card {rank})" for rank in range(4)]
    assert room.device_map(recipe("device=cpu")) == ["cpu"]
    assert room.device_map(recipe("parallel=single")) == ["cuda:0 (card 0)"]
    assert len(room.device_map(recipe("cluster.workers=2", "parallel=fsdp"))) == 2
    with pytest.raises(UsageError, match=r"batch\.size=30 is not divisible by 4 data ranks"):
        room.device_map(recipe("batch.size=30"))


def test_a_gpu_is_not_shared_by_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    message = "4 ranks on gpu07, which has 2 GPUs: a rank needs one of its own; choose at most 2 "
    with pytest.raises(UsageError, match=message):
        room.device_map(recipe("cluster.workers=4"))
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match=message):
        room.launch(recipe())
    assert room.device_map(recipe("cluster.workers=4", "device=cpu")) == ["cpu"] * 4


@pytest.mark.parametrize("asked", ["many", "0", "-1"])
def test_a_number_of_workers_is_a_number(asked: str) -> None:
    with pytest.raises(UsageError, match=f"cluster.workers={asked}: choose auto, or a number"):
        recipe(f"cluster.workers={asked}")


def test_a_layout_for_one_process_refuses_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "places", lambda device, count: ["cpu"] * count)
    with pytest.raises(UsageError, match="parallel=single runs on one process"):
        room.device_map(recipe("parallel=single", "cluster.workers=2"))


def test_a_pipelines_word_reaches_the_stages_that_know_it() -> None:
    words = ["experiment=quickstart", "cluster=in_process"]
    configs = {config.stage: config for config in compose("pipeline", words)}
    ppo, sft = configs["ppo"], configs["sft"]
    assert isinstance(ppo, PpoRun)
    assert isinstance(sft, TrainingRun)
    assert ppo.cluster.kind is ClusterKind.IN_PROCESS
    assert sft.cluster.workers == "auto"
