"""The one pipeline that several tests compare with."""

import importlib
from pathlib import Path

import pytest

from tests.tiny import STAGES, WORDS, framework


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed pipeline. Its stages' modules are imported, so that a forked process need not."""
    for stage in STAGES:
        importlib.import_module(f"framework.stages.{stage}")
    root = tmp_path_factory.mktemp("whole") / "run"
    framework("pipeline", *WORDS, f"run.dir={root}", cwd=root.parent)
    return root
