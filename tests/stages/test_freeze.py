"""`train.last_layers` and `train.freeze` as a user meets them: what stands still keeps its bits in model/."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny import framework, model_folders


def test_sft_of_the_last_layer_alone(tmp_path: Path) -> None:
    policy, _ = model_folders(tmp_path)
    words = [f"init_from={policy}", "data.train=[corpora/tang/sft.train.jsonl]", "data.max_tokens=32", "batch.size=4"]
    words += ["train.steps=2", "optim.lr=1e-2", "device=cpu", "threads=1", "tracking.progress=false"]
    done = framework("sft", *words, "train.last_layers=1", "train.freeze=[layers.*.attention.k]", cwd=tmp_path)
    learning = 3 * 32 * 32 + 3 * 32 * 96 + 3 * 32  # q, v, o; gate, up, down; norms
    assert f"{learning:,} of " in done.stdout
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (policy, tmp_path / "runs/sft/model"))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"}
