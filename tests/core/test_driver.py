"""Why a GPU cannot be used, told from a stand-in of nvidia-smi and of the kernel's version file."""

import os
from pathlib import Path

import pytest

from framework.core import driver
from framework.core.driver import Driver, find_driver, has_gpu, why_unusable

SMI = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
"""
KERNEL = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build  (dvs-builder)
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without GPU, driver or nvidia-smi; tests put them there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(driver, "VERSION_FILE", str(tmp_path / "version"))
    monkeypatch.setattr(driver, "_DEVICE", str(tmp_path / "nvidia0"))
    return tmp_path


def put_smi(machine: Path, text: str, code: int = 0) -> None:
    program = machine / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    program.chmod(0o755)


def test_a_machine_without_a_gpu_has_none(machine: Path) -> None:
    assert find_driver() is None
    assert not has_gpu()
    assert "no NVIDIA driver was found: install NVIDIA's driver" in why_unusable("2.13.0", "13.0")


def test_the_driver_is_read_from_nvidia_smi_or_the_kernel(machine: Path) -> None:
    (machine / "version").write_text(KERNEL)
    assert find_driver() == Driver("535.183.01")
    put_smi(machine, SMI)
    assert find_driver() == Driver("550.54.15", "12.4")
    put_smi(machine, "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", 9)
    assert find_driver() == Driver("535.183.01")
    assert has_gpu()


def test_a_device_file_is_a_gpu_even_without_a_driver(machine: Path) -> None:
    (machine / "nvidia0").touch()
    assert has_gpu()


@pytest.mark.parametrize(
    ("built_for", "smi", "expected"),
    [
        (None, SMI, "torch 2.13.0 is built without CUDA, driver 550.54.15 (runs CUDA up to 12.4): install a torch "
                    "built for CUDA 12.x"),
        ("13.0", SMI, "built for CUDA 13.0, driver 550.54.15 (runs CUDA up to 12.4): install a torch built for CUDA "
                      "12.x, or a driver of at least 580"),
        ("12.8", SMI, "the versions fit, but CUDA unknown error; look at nvidia-smi"),
        ("12.8", SMI.replace("550.54.15", "390.10").replace("CUDA Version: 12.4", ""), "a driver of at least 450"),
    ],
)  # fmt: skip
def test_what_would_help(machine: Path, built_for: str | None, smi: str, expected: str) -> None:
    put_smi(machine, smi)
    assert expected in why_unusable("2.13.0", built_for, "CUDA unknown error")


def test_hidden_gpus_are_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_smi(machine, SMI)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides the GPUs" in why_unusable("2.13.0", "12.8")


def test_a_driver_without_a_word_on_cuda_goes_by_the_table() -> None:
    majors = [Driver(version).cuda_major for version in ("580.65.06", "575.51.03", "525.60.13", "470.57.02", "440.33")]
    assert majors == [13, 12, 12, 11, 0]


def test_nvidia_smi_that_hangs_is_not_waited_for(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = machine / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(driver, "_ASK_S", 0.2)
    assert os.access(program, os.X_OK)
    assert find_driver() is None
