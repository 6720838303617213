"""`train.last_layers`, `train.freeze` and `lora.rank` as a user meets them: what stands still keeps its bits, and an
adapter is PEFT's, whose folder is a model to start from."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from framework.main import main
from framework.models.hub import load
from tests.tiny import PPO, forked, model_folders

BOTH = ("model", "adapter")
WORDS = ["data.max_tokens=32", "batch.size=4", "train.steps=2", "optim.lr=1e-2", "device=cpu", "threads=1"]
WORDS += ["tracking.progress=false", "data.train=[corpora/tang/sft.valid.jsonl]"]


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
    pairs = "data.train=[corpora/tang/preference.valid.jsonl]"
    rm = [f"init_from={run / 'adapter'}", *WORDS[:-1], pairs, "lora.rank=2", "run.dir=runs/rm"]
    forked("reward_model", *rm, cwd=tmp_path)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "runs/rm/model", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.num_labels == 1


def test_ppo_learns_an_adapter_and_its_generator_gives_the_actor_s_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy, reward = model_folders(tmp_path)
    words = [*PPO, f"init_from={policy}", f"reward_from={reward}", "ppo.iterations=1", "lora.rank=8", "optim.lr=1e-2"]
    assert main(["ppo", *words, "lora.targets=[q,v]"]) == 0
    run = tmp_path / "runs" / "ppo"
    (figures,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"step": 1' in line]
    assert figures["ppo/generator_gap/max"] == figures["sync/canary_gap"] == 0
    before, merged, adapted = (dict(load(folder).named_parameters()) for folder in (policy, *map(run.joinpath, BOTH)))
    for name, weight in before.items():
        assert torch.equal(merged[name], adapted[name])
        assert torch.equal(merged[name], weight) == (not name.endswith((".q.weight", ".v.weight"))), name


def test_an_adapter_over_a_base_in_four_bits(tmp_path: Path) -> None:
    """QLoRA as a user runs it; the merged model is not the base, whose numbers the four bits have rounded."""
    pytest.importorskip("bitsandbytes")
    policy, _ = model_folders(tmp_path)
    forked("sft", f"init_from={policy}", *WORDS, "lora.rank=4", "lora.base=nf4", cwd=tmp_path)
    run, x = tmp_path / "runs" / "sft", torch.arange(6, 26).unsqueeze(0)
    before, after = load(policy), load(run / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    with torch.no_grad():
        torch.testing.assert_close(after.logits(after(x)), theirs(x).logits, rtol=0, atol=1e-4)
    for a, b in zip(before.layers.parameters(), after.layers.parameters(), strict=True):
        assert a.dim() == 1 or not torch.equal(a, b)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
