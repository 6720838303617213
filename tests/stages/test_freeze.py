"""`train.last_layers`, `train.freeze` and `lora.rank` as a user meets them: what stands still keeps its bits, and an
adapter is PEFT's, whose folder is a model to start from."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.tiny import forked, model_folders

WORDS = ["data.max_tokens=32", "batch.size=4", "train.steps=2", "optim.lr=1e-2", "device=cpu", "threads=1"]
WORDS += ["tracking.progress=false", "data.train=[corpora/tang/sft.train.jsonl]"]


def test_sft_of_the_last_layer_alone(tmp_path: Path) -> None:
    policy, _ = model_folders(tmp_path)
    words = [f"init_from={policy}", *WORDS, "train.last_layers=1", "train.freeze=[layers.*.attention.k]"]
    done = forked("sft", *words, cwd=tmp_path)
    learning = 3 * 32 * 32 + 3 * 32 * 96 + 3 * 32  # q, v, o; gate, up, down; norms
    assert f"{learning:,} of " in done.stdout
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (policy, tmp_path / "runs/sft/model"))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"}


def test_an_adapter_is_trained_saved_explained_and_started_from(tmp_path: Path) -> None:
    policy, _ = model_folders(tmp_path)
    words = [f"init_from={policy}", *WORDS, "lora.rank=4", "lora.targets=[q,v]", "lora.dora=true", "lora.dropout=0.1"]
    planned = forked("explain", "sft", *words, cwd=tmp_path).stdout
    learning = 2 * (2 * 4 * 32 + 32)
    assert f"{learning:,} of them learn" in planned
    assert f"{learning:,} of " in forked("sft", *words, cwd=tmp_path).stdout
    peft = pytest.importorskip("peft")
    run = tmp_path / "runs" / "sft"
    base = transformers.AutoModelForCausalLM.from_pretrained(policy)
    x = torch.arange(6, 26).unsqueeze(0)
    with torch.no_grad():
        before = base(x).logits.clone()
        adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()(x).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(run / "model")(x).logits
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-5)
    assert (adapted - before).abs().max() > 1e-4
    forked("generate", "runs/sft/adapter", "花", "--max-tokens=8", cwd=tmp_path)
    pairs = "data.train=[corpora/tang/preference.train.jsonl]"
    rm = [f"init_from={run / 'adapter'}", *WORDS[:-1], pairs, "lora.rank=2", "run.dir=runs/rm"]
    forked("reward_model", *rm, cwd=tmp_path)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "runs/rm/model", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.num_labels == 1
