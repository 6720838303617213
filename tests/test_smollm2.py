"""A real model as a user works with it: chat, an adapter, merged and apart, in transformers and peft; DPO after it.

Nightly: it fetches a package of 93 MB and takes minutes.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from framework.models import hub
from tests.tiny import framework

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run(["bash", str(ROOT / "launch" / "smollm2"), str(folder)], check=True, env=os.environ, timeout=1200)
    return folder


def test_it_says_what_transformers_says(model: Path, tmp_path: Path) -> None:
    ours, theirs = hub.load(model), transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    x = torch.tensor([tokenizer("The capital of France is Paris, and that of Italy is")["input_ids"]])
    with torch.no_grad():
        a, b = ours.logits(ours(x)), theirs(x).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    answer = framework("generate", str(model), "What is the capital of France?", "--temperature=0", cwd=tmp_path).stdout
    assert "The capital of France is Paris." in answer


def test_an_adapter_learns_a_domain(model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    words = ["experiment=smollm2/sft", f"init_from={model}", "train.steps=12", "tracking.progress=false"]
    framework("sft", *words, "run.root=runs", cwd=tmp_path, timeout=1800)
    figures = json.loads((tmp_path / "runs/sft/summary.json").read_text())["figures"]
    assert figures["valid/loss"] < 0.8 * figures["valid/loss/before"]
    base = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    x = torch.arange(100, 130).unsqueeze(0)
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/sft/model").eval()(x).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "runs/sft/adapter").eval()(x).logits
    assert (adapted - merged).abs().max() <= 1e-4 * merged.abs().max()


def test_preference_learning_moves_unseen_pairs(model: Path, tmp_path: Path) -> None:
    """From the model itself, four steps: ln 2 before, and less after."""
    words = ["experiment=smollm2/preference", f"init_from={model}", "train.steps=4", "optim.lr=1e-3"]
    words += ["data.valid=[0.003]", "tracking.progress=false", "run.root=runs"]
    framework("preference", *words, cwd=tmp_path, timeout=1800)
    figures = json.loads((tmp_path / "runs/preference/summary.json").read_text())["figures"]
    assert abs(figures["valid/loss/before"] - 0.693147) < 1e-4
    assert figures["valid/loss"] < figures["valid/loss/before"]
    assert figures["valid/reward_margin"] > 0
    assert (tmp_path / "runs/preference/adapter/adapter_config.json").exists()
