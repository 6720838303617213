"""Kernels are compiled for the emulator with CUDA's own headers: without them, what needs it is skipped. On a card
(CUDA_EXT_DEVICE=cuda) nothing needs it, for a library built elsewhere serves."""

import os
import shutil

import pytest

from cuda_ext.build import EMULATOR, BuildError, toolkit


def why_not() -> str:
    try:
        toolkit()
    except BuildError as error:
        return str(error)
    return "" if shutil.which(EMULATOR.compiler) else f"no {EMULATOR.compiler} was found"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "" if os.environ.get("CUDA_EXT_DEVICE") == "cuda" else why_not()
    for item in items if reason else []:
        if item.name.startswith("test_emulated") or item.path.name in ("test_emulator.py", "test_new_op.py"):
            item.add_marker(pytest.mark.skip(reason=f"the emulator cannot be built: {reason}"))
