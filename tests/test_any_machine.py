"""The CPU path without what only Linux has: no fcntl, no resource, no /proc, no SIGUSR1, and it still trains."""

import subprocess
import sys
from pathlib import Path

from tests.test_bad_input import pretrain
from tests.tiny import environment

# What is hidden is hidden from Python alone; the libraries beneath it have builds of their own for each system.
BARE = """
import builtins, io, os, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGUSR1

def hiding(real):
    def call(path, *args, **kwargs):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith("/proc"):
            raise FileNotFoundError(2, "hidden", str(path))
        return real(path, *args, **kwargs)
    return call

builtins.open, io.open = hiding(open), hiding(io.open)
os.open, os.stat, os.listdir, os.scandir = map(hiding, (os.open, os.stat, os.listdir, os.scandir))
assert not os.path.exists("/proc/self")
from framework.main import main
"""


def test_a_tokenizer_and_a_model_are_trained_without_linux(tmp_path: Path) -> None:
    tokenizer = ["tokenizer", "experiment=quickstart/tokenizer", f"run.root={tmp_path}"]
    code = f"{BARE}assert main({tokenizer}) == 0\nassert main({list(pretrain(tmp_path, tmp_path))}) == 0\n"
    code += f"assert main(['status', {str(tmp_path / 'pretrain')!r}]) == 0\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "finished, step 8 of 8" in done.stdout
    assert (tmp_path / "pretrain/model/model.safetensors").exists()
