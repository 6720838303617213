"""The tools as a user types them: generate, chat, status, report, doctor."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.test_bad_input import pretrain
from tests.tiny import command, environment, forked, framework


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer's and a pretraining run."""
    folder = tmp_path_factory.mktemp("tools")
    forked("tokenizer", "experiment=quickstart/tokenizer", f"run.root={folder}", cwd=folder)
    forked(*pretrain(folder, folder), cwd=folder)
    return folder


def test_generate_answers_each_prompt_and_repeats_with_its_seed(root: Path) -> None:
    words = ("generate", str(root / "pretrain"), "春風", "--raw", "--samples", "2", "--max-tokens", "8", "--seed", "3")
    first, second = (forked(*words, cwd=root).stdout for _ in range(2))
    assert first == second
    assert all(line.startswith("春風") for line in first.splitlines()[:1])


def test_chat_answers_until_the_end_of_input(root: Path) -> None:
    done = subprocess.run(
        command("chat", str(root / "pretrain"), "--max-tokens", "4"),
        input="你好\n\n再見\n", cwd=root, env=environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4


def test_status_and_report_read_what_lies_there(root: Path) -> None:
    told = forked("status", str(root), cwd=root).stdout
    assert "pretrain: finished, step 8 of 8 (100%)" in told
    page = forked("report", str(root), cwd=root).stdout.strip()
    assert "pretrain" in Path(page).read_text()


def test_doctor_names_what_is_there_and_what_is_missing(root: Path) -> None:
    told = forked("doctor", cwd=root).stdout
    for word in ("torch", "device", "gloo", "rms_norm: reference"):
        assert word in told


def test_doctor_examines_ranks_of_this_machine(root: Path) -> None:
    lines = framework("doctor", "cluster.workers=2", "device=cpu", cwd=root).stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert re.fullmatch(
            rf"node \S+ \(rank {rank}\) on cpu: matmul [\d.]+ ms, all-reduce on the node [\d.]+ ms", line
        )
