"""A model of another family through all stages, from nothing to PPO, and each stage's folder in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from framework.models import hub
from tests.tiny import WORDS, forked

AXES = {
    "bloom": "position=alibi norm=layer embedding_norm=true activation=gelu_tanh attention_bias=all mlp_bias=true",
    "qwen3": "qk_norm=true num_kv_heads=1 window=6",
    "glm4": "norm_place=sandwich rope_fraction=0.5 rope_interleaved=true attention_bias=qkv tied=false",
}


@pytest.mark.parametrize("family", ["bloom", pytest.param("qwen3", marks=pytest.mark.nightly), "glm4"])
def test_a_family_goes_through_every_stage_and_into_transformers(family: str, tmp_path: Path) -> None:
    words = [f"pretrain.model.{word}" for word in (f"family={family}", *AXES[family].split())]
    forked("pipeline", *WORDS, *words, cwd=tmp_path)
    for stage in ("pretrain", "sft", "reward_model", "ppo"):
        folder = tmp_path / "runs" / "quickstart" / stage / "model"
        kind: Any = transformers.AutoModelForCausalLM
        if stage == "reward_model":
            kind = transformers.AutoModelForSequenceClassification
        theirs, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert theirs.config.model_type == family == json.loads((folder / "config.json").read_text())["model_type"]
        x = torch.arange(6, 26).unsqueeze(0)
        with torch.no_grad():
            body = theirs.get_decoder() if stage != "reward_model" else theirs.base_model
            torch.testing.assert_close(hub.load(folder)(x), body(x).last_hidden_state, rtol=0, atol=1e-5)
