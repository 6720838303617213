"""The built libraries: whether the one for GPUs can run here, and the operators that a loaded one holds.

Every reason against it is one line that says what would help; nothing here raises because a library is missing, old,
or built for something else. Left out: building (`cuda_ext.build`).
"""

import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuda_ext.build import BUILT, CUDA, EMULATOR, KINDS, ROOT, TARGET, build, kernels, library_path, newest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ROOT", "kernels"]
_OLDEST_CARD = 80  # compute capability 8.0


def operators(tensor: "Tensor") -> Any:
    """The operators of the loaded library that serves `tensor`'s device: they write their outputs."""
    import torch

    if tensor.device.type == "cuda":
        return torch.ops.cuda_ext_cuda
    emulator()
    return torch.ops.cuda_ext_emulator


def why_not(device: int) -> str:
    """Why CUDA card `device` is not served by a library; "" if it is, and then the library is loaded."""
    found = _find()
    if isinstance(found, str):
        return found
    opened = _open(found)
    if isinstance(opened, str):
        return opened
    capability = opened.cuda_ext_capability(device)
    if capability < _OLDEST_CARD:
        return f"card {device} has compute capability {capability / 10}, the kernels need {_OLDEST_CARD / 10}"
    return _register(found)


@functools.cache
def emulator() -> Path:
    """The emulator's library, built and loaded; $CUDA_EXT_EMULATOR=address takes AddressSanitizer's."""
    path = build(KINDS[os.environ.get("CUDA_EXT_EMULATOR", EMULATOR.name)])
    reason = _register(path)
    if reason:
        raise RuntimeError(reason)
    return path


def emulate(seed: int = 0, first_block: int = 0, last_block: int = (1 << 63) - 1) -> None:
    """Of the emulator's next launches: the order in which threads go on, and which blocks run."""
    ctypes.CDLL(str(emulator())).cuda_ext_emulate(
        ctypes.c_uint32(seed), ctypes.c_int64(first_block), ctypes.c_int64(last_block)
    )


def _find() -> Path | str:
    """The library for GPUs: $CUDA_EXT_LIBRARY, or what was built from these sources."""
    named = os.environ.get("CUDA_EXT_LIBRARY")
    if named:
        return Path(named) if Path(named).exists() else f"CUDA_EXT_LIBRARY={named}: there is no such file"
    if library_path(CUDA).exists():
        return library_path(CUDA)
    old = newest(CUDA, BUILT)
    if old:
        return f"{old.name} was built from other sources: python -m cuda_ext build makes it anew"
    return "no kernel is built: python -m cuda_ext build makes the library where nvcc is"


@functools.cache
def _open(path: Path) -> ctypes.CDLL | str:
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TARGET:
        return f"{path.name} was built for torch {TARGET[0]}.{TARGET[1]} or newer, and this is torch {version}"
    import torch

    if torch.version.cuda is None:
        return f"torch {version} is built for CPUs"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    library.cuda_ext_versions(ctypes.byref(driver), ctypes.byref(runtime))
    if driver.value // 1000 < runtime.value // 1000:
        return f"the driver is for CUDA {_version(driver.value)}, and {path.name} needs {_version(runtime.value)}"
    return library


@functools.cache
def _register(path: Path) -> str:
    import torch  # noqa: F401  torch's own libraries must be there first

    try:
        count = ctypes.CDLL(str(path)).cuda_ext_register()
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return "" if count > 0 else f"{path.name} holds more operators than its binding has places for"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"
