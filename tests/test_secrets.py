"""Secrets stay in the environment: planted there, none is found in an argv, in anything that a run leaves, or in what
its private Ray writes while it lives. A visible word, searched for in the same way, shows that the search finds.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framework.cluster import local_ray
from tests.test_modify_ppo import BLOCKS
from tests.tiny import WORDS, command, environment

pytestmark = pytest.mark.timeout(600)
# Long enough to be met nowhere by chance, and of the form that each service gives out.
SECRETS = {
    "WANDB_API_KEY": "5ec2e7" + "0f1d2c3b4a" * 3 + "9876",
    "HF_TOKEN": "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",
    "AWS_SECRET_ACCESS_KEY": "planted/AwsSecret+AccessKey/0123456789ab",
    "AWS_SESSION_TOKEN": "plantedAwsSessionTokenplantedAwsSessionToken==",
}
_TOKEN = b"RAY_AUTH_TOKEN="  # what opens the private Ray: in the environment of its processes, like every secret
VISIBLE = "word-that-anyone-may-see"


@dataclass
class Watch:
    """What was seen while a command ran: every command line, the private Ray's token, and every file under `folders`,
    kept open so that it can be read to its end when it is gone."""

    folders: list[Path]
    tokens: set[str] = field(default_factory=set)
    lines: set[bytes] = field(default_factory=set)
    files: dict[tuple[int, int], tuple[str, BufferedReader]] = field(default_factory=dict)

    def look(self) -> None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                self.lines.add(entry.read_bytes())
                self._find_token(entry.with_name("environ").read_bytes().split(b"\0"))
        for folder in self.folders:
            for inside, _, names in os.walk(folder):
                for name in names:
                    with contextlib.suppress(OSError):
                        self._open(Path(inside, name))

    def _find_token(self, variables: list[bytes]) -> None:
        if f"TMPDIR={self.folders[-1]}".encode() in variables:
            self.tokens |= {v.removeprefix(_TOKEN).decode() for v in variables if v.startswith(_TOKEN)}

    def _open(self, path: Path) -> None:
        stat = path.lstat()
        if path.is_file() and not path.is_symlink() and (stat.st_dev, stat.st_ino) not in self.files:
            self.files[stat.st_dev, stat.st_ino] = str(path), path.open("rb")

    def holding(self, text: str) -> list[str]:
        """Where `text` stands: names of files, and command lines."""
        found = [line.decode(errors="replace") for line in self.lines if text.encode() in line]
        for name, stream in self.files.values():
            stream.seek(0)
            if text.encode() in name.encode() + stream.read():
                found.append(name)
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Watch]]:
    """(run folder of a tiny pipeline whose PPO ran on Ray with wandb, all that was seen)"""
    folder = tmp_path_factory.mktemp("secrets")
    home, temporary = folder / "home", Path(f"/tmp/s{os.getpid()}")  # a socket's path is short
    home.mkdir()
    temporary.mkdir()
    for name in ("near", "short"):
        (folder / f"{name}.py").write_text(BLOCKS[name])
    words = [*(word for word in WORDS if word != "ppo.cluster=in_process"), "ppo.cluster=ray", "tracking=wandb"]
    words += [f"tracking.project={VISIBLE}", "run.dir=run", "ppo.extensions=[near.py,short.py]"]
    words += ["ppo.ppo.policy_loss=near", "ppo.ppo.reward=short"]
    words += ["ppo.ppo.iterations=1", "ppo.ppo.critic_warmup=0"]
    words += ["pretrain.train.steps=2", "sft.train.steps=2", "reward_model.train.steps=2"]
    places = {"HOME": str(home), "TMPDIR": str(temporary), "WANDB_MODE": "offline"}
    watch = Watch([folder, temporary])
    process = subprocess.Popen(
        command("pipeline", *words), cwd=folder, env=environment() | SECRETS | places, text=True,
        stdout=(folder / "printed").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 550
    while process.poll() is None and time.monotonic() < deadline:
        watch.look()
        time.sleep(0.3)
    process.kill()
    watch.look()
    assert process.wait() == 0, (folder / "printed").read_text()
    yield folder / "run", watch
    for _, stream in watch.files.values():
        stream.close()
    shutil.rmtree(temporary)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_of_the_environment_is_found_nowhere(watched: tuple[Path, Watch], name: str) -> None:
    assert watched[1].holding(SECRETS[name]) == []


def test_the_private_rays_token_is_found_nowhere(watched: tuple[Path, Watch]) -> None:
    (token,) = watched[1].tokens
    assert len(token) == 64
    assert watched[1].holding(token) == []


def test_the_search_finds_what_is_there(watched: tuple[Path, Watch]) -> None:
    _, watch = watched
    found = watch.holding(VISIBLE)
    assert any(name.startswith("/") and name.endswith("/ppo/config.yaml") for name in found)
    assert any("\0tracking.project=" in line for line in found)
    assert any("/wandb/offline-run-" in name for name in found)
    seen = [name for name, _ in watch.files.values()]
    for part in ("ppo/logs/actor-0.log", "report.html", "manifest.json", "raylet.out", "gcs_server.out"):
        assert any(part in name for name in seen), part
    assert any(b"ray::" in line for line in watch.lines)
    assert any(b"raylet" in line for line in watch.lines)


def test_code_of_ones_own_reaches_the_workers_on_ray(watched: tuple[Path, Watch]) -> None:
    run = watched[0] / "ppo"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["actor/pull"] > 0
    for sample in map(json.loads, (run / "samples.jsonl").read_text().splitlines()):
        if "task" not in sample:
            assert sample["score"] == pytest.approx(-abs(len(sample["response"]) - 10) / 10, abs=1e-4)
    assert list(json.loads((run / "summary.json").read_text())["extensions"]) == ["near.py", "short.py"]


def test_ray_is_told_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: the real one, imported here, would read its settings from this test's environment and keep them."""
    told: list[dict[str, Any]] = []
    stand_in = SimpleNamespace(init=lambda **words: told.append(words), shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    for step in ("_read_environment", "_silence_driver", "_shut_down"):
        monkeypatch.setattr(local_ray, step, lambda: None)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with local_ray.joined_ray(f"127.0.0.1:{server.getsockname()[1]}"):
            pass
        with local_ray.local_ray(cpus=1):
            pass
    assert [set(words.get("runtime_env", {}).get("env_vars", {})) for words in told] == [{"PYTHONPATH"}, set()]
    assert not [name for name, secret in SECRETS.items() if secret in repr(told)]
