"""Why no library serves a card: each reason is one line that says what would help; nothing is silent or raises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_ext import dispatch, library
from cuda_ext.build import CUDA
from cuda_ext.rms_norm.op import rms_norm


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_EXT_LIBRARY", raising=False)
    library._open.cache_clear()


def test_none_was_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "library_path", lambda kind: tmp_path / "cuda-1.so")
    monkeypatch.setattr(library, "BUILT", tmp_path)
    assert library.why_not(0) == "no kernel is built: python -m cuda_ext build makes the library where nvcc is"
    (tmp_path / "cuda-0.so").touch()
    assert library.why_not(0) == "cuda-0.so was built from other sources: python -m cuda_ext build makes it anew"


def test_a_library_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_EXT_LIBRARY", str(tmp_path / "a.so"))
    assert library.why_not(0) == f"CUDA_EXT_LIBRARY={tmp_path / 'a.so'}: there is no such file"
    (tmp_path / "a.so").write_bytes(b"no library")
    assert library.why_not(0) == f"torch {torch.__version__} is built for CPUs"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library._open.cache_clear()
    assert "a.so cannot be loaded: " in library.why_not(0)


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_EXT_LIBRARY", str(tmp_path / "a.so"))
    (tmp_path / "a.so").touch()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.9.1+cu128")
    assert library.why_not(0) == "a.so was built for torch 2.11 or newer, and this is torch 2.9.1+cu128"


@pytest.mark.parametrize(
    ("driver", "capability", "says"),
    [
        (0, 0, "the driver is for CUDA none, and a.so needs 13.0"),
        (12080, 90, "the driver is for CUDA 12.8, and a.so needs 13.0"),
        (13000, 75, "card 0 has compute capability 7.5, the kernels need 8.0"),
    ],
)
def test_an_old_driver_or_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: int, capability: int, says: str
) -> None:
    class Loaded:
        def __init__(self, path: str):
            pass

        def cuda_ext_versions(self, of_driver: object, of_runtime: object) -> None:
            of_driver._obj.value, of_runtime._obj.value = driver, 13000  # type: ignore[attr-defined]

        def cuda_ext_capability(self, _: int) -> int:
            return capability

    monkeypatch.setenv("CUDA_EXT_LIBRARY", str(tmp_path / "a.so"))
    (tmp_path / "a.so").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("ctypes.CDLL", Loaded)
    assert library.why_not(0) == says


def test_what_is_forced_and_cannot_run_is_an_error() -> None:
    with dispatch.use("cuda"), pytest.raises(RuntimeError, match="CUDA_EXT=cuda, but rms_norm would run as reference"):
        rms_norm(torch.ones(2), torch.ones(2), 1e-5)
    with dispatch.use("cdua"), pytest.raises(ValueError, match="CUDA_EXT=cdua is unknown: choose one of auto, cuda"):
        rms_norm(torch.ones(2), torch.ones(2), 1e-5)


def test_what_the_kernel_does_not_take_goes_to_the_reference() -> None:
    with dispatch.use("emulator"):
        assert dispatch.choose("rms_norm", torch.ones(2, dtype=torch.float64)) is dispatch.NO_DTYPE
        assert dispatch.choose("rms_norm", torch.ones(2)) is dispatch.EMULATED
    with dispatch.use("reference"):
        assert dispatch.choose("rms_norm", torch.ones(2)) is dispatch.FORCED
    assert dispatch.choose("rms_norm", torch.ones(2)) is dispatch.ON_CPU


def test_the_environment_chooses() -> None:
    code = "import cuda_ext; print(cuda_ext.explain())"
    env = os.environ | {"CUDA_EXT": "emulator"}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "rms_norm: kernel (on the CPU, by the emulator)" in told.splitlines()


def test_the_path_of_a_library_is_that_of_its_sources() -> None:
    assert library.library_path(CUDA) == library.library_path(CUDA)
    assert library.library_path(CUDA).suffix == ".so"
