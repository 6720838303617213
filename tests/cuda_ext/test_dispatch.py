"""`explain()` names every operator, needs no torch, and the log says once what ran."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_ext
from cuda_ext import dispatch
from cuda_ext.swiglu.op import swiglu

ROOT = Path(cuda_ext.__file__).parent


def test_every_folder_with_an_op_is_explained_and_documented() -> None:
    folders = sorted(path.parent.name for path in ROOT.glob("*/op.py"))
    assert [line.split(":")[0] for line in cuda_ext.explain().splitlines()] == folders
    for folder in folders:
        assert (ROOT / folder / "reference.py").is_file()
        assert (ROOT / folder / "README.md").is_file()


def test_explaining_needs_no_torch() -> None:
    code = "import sys, cuda_ext; assert 'adamw: reference' in cuda_ext.explain(); assert 'torch' not in sys.modules"
    env = os.environ | {"CUDA_EXT_LIBRARY": "none"}  # one that is built here would be opened, for which torch is needed
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)


def test_the_log_says_once_what_ran_and_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level(logging.INFO, logger="cuda_ext"):
        for strict in (False, False, True):
            swiglu(torch.ones(2), torch.ones(2), strict=strict)
    assert [record.message for record in caplog.records] == [
        "swiglu runs as reference (on a CPU: CUDA_EXT=emulator runs the kernel, slowly)",
        "swiglu runs as reference (strict mode: bits that do not depend on the batch)",
    ]
