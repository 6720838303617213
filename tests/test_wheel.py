"""A wheel carries its recipes and corpus along and runs a shortened quickstart outside the checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import WORDS, command, environment

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_runs_the_quickstart_without_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    pure = os.environ | {"CUDA_EXT_BUILD": "0"}  # the kernels: tests/cuda_ext
    subprocess.run(build, check=True, timeout=200, env=pure)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True, timeout=100)
    kernels = [path.relative_to(ROOT) for path in (ROOT / "cuda_ext").glob("*/*.cu*")]
    assert [path for path in kernels if not (installed / path).exists()] == []

    outside = tmp_path / "outside"
    outside.mkdir()
    place = environment() | {"PYTHONPATH": str(installed)}
    where = [sys.executable, "-c", "import framework, cuda_ext; print(framework.__file__); print(cuda_ext.__file__)"]
    found = subprocess.run(where, cwd=outside, env=place, capture_output=True, text=True, check=True).stdout.split()
    assert all(Path(path).is_relative_to(installed) for path in found), found

    done = subprocess.run(
        command("pipeline", *WORDS), cwd=outside, env=place, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((outside / "runs/quickstart/summary.json").read_text())
    assert "ppo/valid/score" in summary["figures"]
    assert os.listdir(outside) == ["runs"]
