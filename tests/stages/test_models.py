"""`framework models` as a user types it: the list, the axes, models side by side, folders, what it refuses."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from framework.core.registry import lookup, names
from framework.main import main
from framework.models.presets import preset, presets
from framework.models.transformer import Transformer
from framework.planning.parameters import kv_bytes
from framework.stages.models import comparison, listing


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out


def cells(lines: list[str]) -> dict[str, list[str]]:
    """Fact -> what it is of each model."""
    rows = [re.split(r" {2,}", line.strip()) for line in lines[1:]]
    return {row[0]: row[1:] for row in rows}


def facts(*given: str) -> dict[str, list[str]]:
    return cells(comparison(given))


def test_it_answers_without_torch() -> None:
    code = (
        "import sys; from framework.main import main\n"
        "for words in ([], ['axes'], ['compare', 'tiny', 'bloom-7b']): assert main(['models', *words]) == 0\n"
        "assert main(['models', 'compare', 'lama-7b']) == 2\n"
        "heavy = {'torch', 'transformers', 'hydra', 'omegaconf'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_list_has_every_family_and_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys)
    for name in names("family"):
        family = lookup("family", name)
        theirs = family.causal.format(family.name)
        assert family.covers, f"{name} does not say which published models it covers"
        assert re.search(rf"^{name} +{theirs} +{re.escape(family.covers)}$", text, re.MULTILINE), name
        assert name in ("framework", "chatglm") or hasattr(transformers, theirs)
    listed = [line.split()[0] for line in listing() if re.match(r"\S+ +\S+ +[\d,]+( \+ [\d,]+ V)?  ", line)]
    assert sorted(listed) == presets()
    assert re.search(r"^llama-3\.2-1b +llama +1,235,814,400 +16 +2,048 +32/8 +131,072$", text, re.MULTILINE)


def test_the_axes_are_as_many_as_the_stage_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, "axes").splitlines()
    keys = [line for line in lines if re.match(r"model\.[\w.]+=\S+  \S", line)]
    assert main(["pretrain", "--help"]) == 0
    promised = re.search(r"model\.AXIS=\.\.\. +(\d+) axes of the architecture", capsys.readouterr().out)
    assert promised
    assert len(keys) == int(promised[1])
    assert "    alibi       -slope of the head x distance, added to the scores (Press et al. 2022)" in lines


def test_three_models_side_by_side() -> None:
    """KV: 2 x layers x heads x size x 2 bytes. FLOPs: 2 a weight that is no embedding, no bias and no norm, and
    4 x 4096 a layer and token of the context."""
    found = facts("llama-2-7b", "bloom-7b", "glm-4-9b")
    assert found["parameters"] == ["6,738,415,616", "7,069,016,064", "9,399,951,360"]
    assert found["heads / kv heads x size"] == ["32 / 32 x 128", "32 / 32 x 128", "32 / 2 x 128"]
    assert found["positions"] == ["rotary", "alibi", "rotary, 0.5 of a head, interleaved"]
    assert found["norm"] == ["rms 1e-05, pre", "layer 1e-05, pre + embedding", "rms 1.5625e-07, pre"]
    assert found["feed-forward"] == ["swiglu, 11,008", "gelu_tanh, 16,384", "swiglu, 13,696"]
    assert found["biases"] == ["none", "attention, feed-forward", "q k v"]
    assert found["embedding and head"] == ["apart", "tied", "apart"]
    kv = [2 * 32 * 32 * 128 * 2, 2 * 30 * 32 * 128 * 2, 2 * 40 * 2 * 128 * 2]
    assert found["KV bytes a token, bf16"] == [f"{n:,}" for n in kv]
    llama = 2 * (6_738_415_616 - 32_000 * 4_096 - 65 * 4_096)
    bloom = 2 * (30 * 12 * 4_096**2 + 250_880 * 4_096)
    glm = 2 * (40 * 4_096 * (2 * (32 + 2) * 128 + 3 * 13_696) + 151_552 * 4_096)
    assert found["FLOPs a token, forward"] == [f"{n:,}" for n in (llama, bloom, glm)]
    full = [llama + 4 * 4_096 * 32 * 4_096, bloom + 4 * 4_096 * 30 * 2_048, glm + 4 * 4_096 * 40 * 8_192]
    assert found["with a full context"] == [f"{n:,}" for n in full]


def test_windows_scalings_norms_and_open_vocabularies_are_told() -> None:
    found = facts("mistral-7b", "llama-3.1-8b", "qwen3-8b", "tiny")
    assert found["window"] == ["4,096", "-", "-", "-"]
    assert found["rotary scaling"] == ["-", "llama3, 8 x from 8,192", "-", "-"]
    assert found["rotary theta"] == ["10,000", "500,000", "1,000,000", "10,000"]
    assert found["norm"][2] == "rms 1e-06, pre + q and k"
    assert found["parameters"][3] == "803,968 + 128 V"
    assert comparison(["tiny"])[-1] == "V: the tokenizer's vocabulary"
    layers = 4 * (4 * 128 * 128 + 3 * 128 * 352)
    assert found["FLOPs a token, forward"][3] == f"{2 * layers:,} + 256 V"
    assert comparison(["gpt2"])[-1].startswith("  with a full context")


def test_kv_bytes_are_what_transformers_caches() -> None:
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, dtype="bfloat16",
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache = theirs(torch.zeros(1, 7, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 7 * kv_bytes(lookup("family", "qwen2").config_from(config.to_dict()))


def test_a_folder_beside_its_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.GPT2Config(n_layer=2, n_embd=48, n_head=3).save_pretrained(tmp_path)
    text = told(capsys, "compare", "gpt2", str(tmp_path))
    assert str(tmp_path) in text.splitlines()[0]
    found = cells(text.splitlines())
    assert found["heads / kv heads x size"] == ["12 / 12 x 64", "3 / 3 x 16"]
    with torch.device("meta"):
        model = Transformer(replace(preset("gpt2"), hidden_size=48, num_layers=2, num_heads=3))
    assert found["parameters"] == ["124,439,808", f"{sum(p.numel() for p in model.parameters()):,}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "lama-2-7b"], "'lama-2-7b' is neither a preset nor a model folder: did you mean 'llama-2-7b'?"),
        (["compare", "nothing/here"], "`framework models` lists them"),
        (["compare"], "framework models compare llama-2-7b bloom-7b"),
        (["compar", "gpt2"], "unknown verb 'compar': did you mean 'compare'?"),
        (["axes", "gpt2"], "only compare takes names"),
        (["--wide"], "unrecognized arguments: --wide"),
    ],
    ids=str,
)
def test_a_wrong_word_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        (None, "it has no config.json"),
        ("[", "is not JSON"),
        (json.dumps({"model_type": "mamba"}), "holds a model of type 'mamba'"),
        (json.dumps({"model_type": "llama", "vocab_size": 7}), "does not say hidden_size"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        assert main(["models", "compare", str(tmp_path)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert message in said[0]
