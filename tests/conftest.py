"""The one pipeline that several tests compare with. It alone imports the project: kernels are tested without that."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed pipeline. Its stages' modules are imported, so that a forked process need not."""
    from tests.tiny import STAGES, WORDS, framework

    for stage in STAGES:
        importlib.import_module(f"framework.stages.{stage}")
    root = tmp_path_factory.mktemp("whole") / "run"
    framework("pipeline", *WORDS, f"run.dir={root}", cwd=root.parent)
    return root
