"""launch/slurm, submitted with the stand-in Slurm (tests/slurm): real torchrun and real Ray over nodes that are
processes of this machine. What a job does with its nodes, whatever they run, stands in tests/cluster/test_slurm.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm import job_environment
from tests.test_bad_input import pretrain
from tests.test_local import LOCAL
from tests.tiny import PPO, environment, forked, model_folders

LAUNCH = str(Path(LOCAL).with_name("slurm"))
SHORT = [
    "parallel=ddp",
    "tracking.every=1",
    "train.steps=40",
    "train.validate_every=0",
    "checkpoint.every=0",
    "evaluation.tasks=[]",
]


class Submitted:
    """A job: `sbatch launch/slurm WORDS` on so many nodes."""

    def __init__(self, cluster: Path, *words: str, nodes: int, number: int = 7) -> None:
        self.cluster = cluster
        self.process = subprocess.Popen(
            ["sbatch", f"--nodes={nodes}", LAUNCH, *words],
            cwd=_started_in(cluster), env=environment() | job_environment(cluster, number, nodes) | _PYTHON,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """(exit code, stderr)."""
        self.printed, errors = self.process.communicate(timeout=280)
        return self.process.returncode, errors

    def terminate_once(self, condition: Callable[[], bool]) -> None:
        """Slurm's SIGTERM to every node once `condition` holds."""
        while not condition():
            assert self.process.poll() is None, self.end()
            time.sleep(0.02)
        for file in self.cluster.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGTERM)

    @property
    def requeued(self) -> bool:
        return (self.cluster / "requeued").exists()


# launch/slurm takes the environment that is active where there is no .venv.
_PYTHON = {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def _started_in(cluster: Path) -> Path:
    (cluster / "at").mkdir(parents=True, exist_ok=True)
    return cluster / "at"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    forked("tokenizer", "experiment=quickstart/tokenizer", f"run.root={folder}", cwd=folder)
    return folder


def ppo(folder: Path, models: tuple[str, str], *words: str) -> list[str]:
    quiet = [word for word in PPO if not word.startswith("cluster=")]
    return ["ppo", f"init_from={models[0]}", f"reward_from={models[1]}", *quiet, f"run.root={folder}", *words]


def weights(folder: Path, stage: str) -> bytes:
    return (folder / stage / "model/model.safetensors").read_bytes()


def logged(folder: Path, stage: str, step: int) -> Callable[[], bool]:
    file = folder / stage / "metrics.jsonl"
    return lambda: file.exists() and f'"step": {step}' in file.read_text()


@pytest.mark.timeout(900)
def test_two_jobs_at_once_one_stopped_and_requeued(tmp_path: Path, trained: Path) -> None:
    """Training over four nodes ends in the bits of launch/local 4, though it was stopped; beside it PPO over two nodes,
    whose five workers do not fit on one, ends in those of a single process."""
    models = model_folders(tmp_path / "models")
    controlled = Submitted(tmp_path / "b", *ppo(tmp_path, models), nodes=2, number=8)
    words = pretrain(tmp_path / "a", trained, *SHORT)
    training = Submitted(tmp_path / "a", *words, nodes=4)
    training.terminate_once(logged(tmp_path / "a", "pretrain", 3))
    code, errors = training.end()
    assert code == 143, errors
    assert errors.splitlines()[-1] == "slurm: job 7 goes back into the queue"
    assert not (tmp_path / "a/pretrain/summary.json").exists()
    code, errors = controlled.end()
    assert code == 0, errors
    assert not controlled.requeued
    again = Submitted(tmp_path / "a", *words, nodes=4)
    code, errors = again.end()
    assert code == 0, errors
    first, *nodes = again.printed.splitlines()[:5]
    assert first == "pretrain: layout: ddp = replicate 4"
    assert nodes == [f"pretrain: node 127.0.0.{n + 1}: rank {n} on cpu at replicate {n}" for n in range(4)]
    subprocess.run(
        [LOCAL, "4", *pretrain(tmp_path / "local", trained, *SHORT)],
        cwd=tmp_path, env=environment() | _PYTHON, check=True, capture_output=True,
    )  # fmt: skip
    assert weights(tmp_path / "a", "pretrain") == weights(tmp_path / "local", "pretrain")
    forked(*ppo(tmp_path / "one", models, "cluster=in_process"), cwd=tmp_path)
    assert weights(tmp_path, "ppo") == weights(tmp_path / "one", "ppo")


def refused(code: str) -> bool:
    """Whether a stranger who runs `code` is told that his token is missing. Ray would go on trying."""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = any("Authentication token is missing or incorrect" in line for line in process.stderr)
    process.kill()
    process.wait()
    return told


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_ppo_over_two_nodes_is_stopped_and_lets_no_stranger_in(tmp_path: Path) -> None:
    models = model_folders(tmp_path / "models")
    job = Submitted(tmp_path / "b", *ppo(tmp_path, models, "ppo.iterations=60"), nodes=2)
    config, up = tmp_path / "ppo/config.yaml", logged(tmp_path, "ppo", 1)
    while not up():
        assert job.process.poll() is None, job.end()
        time.sleep(0.05)
    address = config.read_text().partition("address: ")[2].split()[0]
    assert refused(f"import ray; ray.init(address='{address}', log_to_driver=False)")
    job.terminate_once(up)
    code, errors = job.end()
    assert code == 143, errors
    assert job.requeued
    code, errors = Submitted(tmp_path / "b", *ppo(tmp_path, models, "ppo.iterations=60"), nodes=2).end()
    assert code == 0, errors
    forked(*ppo(tmp_path / "one", models, "ppo.iterations=60", "cluster=in_process"), cwd=tmp_path)
    assert weights(tmp_path, "ppo") == weights(tmp_path / "one", "ppo")


def test_a_node_that_never_joins_is_named_before_anything_begins(tmp_path: Path, trained: Path) -> None:
    (tmp_path / "127.0.0.3.absent").touch()
    words = pretrain(tmp_path, trained, "cluster.start_deadline_s=3")
    code, errors = Submitted(tmp_path, *words, nodes=3).end()
    assert code == 1
    assert "framework slurm: node 127.0.0.3 did not come within 3 s, 2 of 3 did" in errors
    assert not (tmp_path / "pretrain").exists()


def test_a_wrong_recipe_is_refused_before_any_node_is_asked(tmp_path: Path) -> None:
    code, errors = Submitted(tmp_path, "pretrain", "learning_rate=1", nodes=2).end()
    assert code == 2
    assert errors == (
        "framework slurm: unknown key 'learning_rate': it is set by optim.lr here. `framework pretrain --help` lists "
        "the keys\n"
    )
    assert not list(tmp_path.glob("*.pid"))
