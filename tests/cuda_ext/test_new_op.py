"""`python -m cuda_ext new OP`: what it makes compiles for the emulator and passes its tests; bad names are refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_ext import build, library
from cuda_ext.__main__ import _new

TESTS = Path(__file__).parent


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Copies of the folders that `new` writes to. What the emulator has compiled already comes along."""
    library.emulator()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/__init__.py").touch()
    sources = shutil.ignore_patterns("__pycache__", "*.so", "*.json", "cuda-*", "address-*")
    shutil.copytree(build.ROOT, tmp_path / "cuda_ext", ignore=sources)
    shutil.copytree(TESTS, tmp_path / "tests/cuda_ext", ignore=sources)
    return tmp_path


def test_a_new_op_compiles_and_passes(house: Path) -> None:
    assert _new("gate_2", house / "cuda_ext", house / "tests/cuda_ext") == 0
    made = sorted(path.name for path in (house / "cuda_ext/gate_2").iterdir())
    assert made == ["README.md", "__init__.py", "benchmark.py", "kernel.cu", "op.py", "reference.py"]
    code = f"import cuda_ext; assert {str(house)!r} in cuda_ext.__file__; assert 'gate_2:' in cuda_ext.explain()"
    tests = ["tests/cuda_ext/test_gate_2.py", "tests/cuda_ext/test_gate_2_kernel.py"]
    paths = os.pathsep.join([str(house), str(TESTS.parents[1])])
    for words in (["-c", code], ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]):
        done = subprocess.run(
            [sys.executable, *words], cwd=house, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
    assert list((house / "cuda_ext/built").glob("emulator-gate_2-*.o"))


@pytest.mark.parametrize("name", ["swiglu", "Gate", "2gate", "gate-2", "../gate", ""])
def test_a_name_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "swiglu").mkdir()
    said = _new(name, tmp_path, tmp_path)
    assert said == f"cuda_ext: '{name}' cannot be the name of a new op: small letters, digits and _, and not there yet"
    assert [path.name for path in tmp_path.iterdir()] == ["swiglu"]
