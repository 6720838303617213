"""Why torch cannot use a GPU that is there: the driver, the CUDA that it can run, and the torch that would fit.

Asked only when torch has found no GPU. Left out: torch itself, which `runtime` knows, and cards of other makers.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

VERSION_FILE = "/proc/driver/nvidia/version"
_DEVICE = "/dev/nvidia0"
# The oldest Linux driver of each CUDA, by NVIDIA's release notes; all minor versions of a CUDA run on it.
_OLDEST_DRIVER = {13: 580, 12: 525, 11: 450}
_ASK_S = 10.0


@dataclass(frozen=True)
class Driver:
    """Example: Driver("550.54.15", "12.4"). `cuda` is the newest that it runs, "" where nothing says so."""

    version: str
    cuda: str = ""

    def __str__(self) -> str:
        return f"driver {self.version}" + (f" (runs CUDA up to {self.cuda})" if self.cuda else "")

    @property
    def cuda_major(self) -> int:
        """The newest CUDA that it runs, 0 where it is older than all that are known here."""
        if self.cuda:
            return int(self.cuda.split(".")[0])
        number = int(self.version.split(".")[0])
        return next((cuda for cuda, oldest in _OLDEST_DRIVER.items() if number >= oldest), 0)


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU, whatever torch says."""
    return os.path.exists(_DEVICE) or find_driver() is not None


def find_driver() -> Driver | None:
    """The driver as nvidia-smi tells it, else as the kernel does; None where neither is there."""
    asked = _ask_nvidia_smi()
    version = re.search(r"(?:Driver|KMD) Version:\s*([\d.]+)", asked)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*(\d+\.\d+)", asked)
    if version:
        return Driver(version[1], cuda[1] if cuda else "")
    told = Path(VERSION_FILE).read_text() if os.path.exists(VERSION_FILE) else ""
    version = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", told)
    return Driver(version[1]) if version else None


def why_unusable(torch_version: str, built_for: str | None, reason: str = "") -> str:
    """What stands between this torch and a GPU, and what would help.

    `built_for`: the CUDA that torch was built for, None for a build without; `reason`: torch's own words, shown where
    the versions explain nothing.
    """
    driver = find_driver()
    theirs = "no NVIDIA driver was found" if driver is None else str(driver)
    ours = f"torch {torch_version} is built {'without CUDA' if built_for is None else f'for CUDA {built_for}'}"
    return f"{ours}, {theirs}: {_remedy(built_for, driver, reason)}"


def _remedy(built_for: str | None, driver: Driver | None, reason: str) -> str:
    if driver is None:
        return "install NVIDIA's driver"
    if not driver.cuda_major:
        return f"install a driver of at least {min(_OLDEST_DRIVER.values())}"
    if built_for is None:
        return f"install a torch built for CUDA {driver.cuda_major}.x"
    wanted = int(built_for.split(".")[0])
    if wanted > driver.cuda_major:
        newer = f", or a driver of at least {_OLDEST_DRIVER[wanted]}" if wanted in _OLDEST_DRIVER else ""
        return f"install a torch built for CUDA {driver.cuda_major}.x{newer}"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"CUDA_VISIBLE_DEVICES='{visible}' hides the GPUs; unset it"
    return f"the versions fit, but {reason or 'torch sees no GPU'}; look at nvidia-smi"


def _ask_nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program], capture_output=True, text=True, timeout=_ASK_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
