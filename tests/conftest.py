"""The one pipeline that several tests compare with, which alone imports the project: kernels are tested without that;
and what is skipped where the emulator cannot be built."""

import importlib
import os
import shutil
from pathlib import Path

import pytest

from cuda_ext.build import EMULATOR, BuildError, toolkit


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed pipeline. Its stages' modules are imported, so that a forked process need not."""
    from tests.tiny import STAGES, WORDS, framework

    for stage in STAGES:
        importlib.import_module(f"framework.stages.{stage}")
    root = tmp_path_factory.mktemp("whole") / "run"
    framework("pipeline", *WORDS, f"run.dir={root}", cwd=root.parent)
    return root


def why_no_emulator() -> str:
    """Kernels are compiled for it with CUDA's own headers. On a card nothing needs it: a library built elsewhere
    serves."""
    if os.environ.get("CUDA_EXT_DEVICE") == "cuda":
        return ""
    try:
        toolkit()
    except BuildError as error:
        return str(error)
    return "" if shutil.which(EMULATOR.compiler) else f"no {EMULATOR.compiler} was found"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_emulator()
    for item in items if reason else []:
        if item.name.startswith("test_emulated") or item.path.name in ("test_emulator.py", "test_new_op.py"):
            item.add_marker(pytest.mark.skip(reason=f"the emulator cannot be built: {reason}"))
