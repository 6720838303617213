"""Folders in the Hugging Face format, both ways against transformers; whatever is wrong with one is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import framework.models
from framework.core.errors import CheckpointError, FrameworkError, UsageError
from framework.core.records import whole
from framework.core.registry import lookup
from framework.models import hub
from framework.models.config import Activation, Bias, ModelConfig
from framework.models.transformer import Transformer
from tests.models.drawn import TINY, drawn, tokens

LLAMA = lookup("family", "llama")
KINDS = {
    "grouped, tied": TINY,
    "all heads, untied": replace(TINY, num_kv_heads=0, tied=False),
    "one key head, biases": replace(TINY, num_kv_heads=1, attention_bias=Bias.ALL, mlp_bias=True, tied=False),
    "wide heads, other theta and eps": replace(TINY, head_dim=12, rope_theta=500.0, norm_eps=1e-3),
}
kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def theirs_at(folder: Path, kind: Any = transformers.LlamaForCausalLM) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def drawn_theirs(config: ModelConfig, kind: Any = transformers.LlamaForCausalLM, **more: Any) -> Any:
    """Their own model of that configuration, every parameter drawn, norms included."""
    settings = LLAMA.config_to(config, 0) | more
    settings = {k: v for k, v in settings.items() if k not in ("architectures", "model_type", "rope_theta")}
    torch.manual_seed(0)
    model = kind(transformers.LlamaConfig(**settings))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, p.shape[-1] ** -0.5) if p.dim() == 2 else p.normal_(1, 0.3)
    return model.eval()


@kinds
def test_what_we_save_transformers_loads_with_equal_logits(config: ModelConfig, tmp_path: Path) -> None:
    ours, x = drawn(config), tokens(2, 20)
    framework.models.save(ours, tmp_path)
    theirs = theirs_at(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours.logits(ours(x)), rtol=0, atol=1e-5)
    assert theirs.config.head_dim == config.head_size
    assert theirs.config.dtype == torch.float32


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_after_load_is_bit_equal(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = drawn(config, dtype=dtype)
    hub.save(model, tmp_path / "a")
    loaded = framework.models.load(tmp_path / "a")
    hub.save(loaded, tmp_path / "b")
    assert loaded.config == replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_size)
    for (name, p), (other, q) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
        assert p.dtype == q.dtype
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_load_casts_and_boxes_read_only_a_part(tmp_path: Path) -> None:
    model = drawn()
    hub.save(model, tmp_path)
    assert hub.load(tmp_path, torch.bfloat16).embedding.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    _, read, shapes = hub.read_folder(tmp_path)
    name = "layers.1.mlp.down.weight"
    assert shapes[name] == (32, 40)
    part = read(name, ((3, 5), (10, 7)))
    assert torch.equal(part, model.get_parameter(name).detach()[3:8, 10:17])
    with pytest.raises(CheckpointError, match=r"has no tensor 'norm\.weigt': did you mean 'norm\.weight'"):
        read("norm.weigt", ((0, 1),))


def test_a_reward_model_is_a_sequence_classifier(tmp_path: Path) -> None:
    """Written by us: their class, their scores at the last real token. One class also answers as a value head."""
    model, score = drawn(), torch.randn(1, 32)
    weights = [*model.state_dict().items(), ("class_head.weight", score)]
    hub.save_weights(model.config, weights, tmp_path, classes=1, extra={"pad_token_id": 0, "eos_token_id": 1})
    theirs = theirs_at(tmp_path, transformers.LlamaForSequenceClassification)
    x = tokens(3, 9).clamp(min=1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x)[:, -1] @ score.T, rtol=0, atol=1e-5)
    assert theirs.config.num_labels == 1
    config, read, shapes = hub.read_folder(tmp_path)
    assert shapes["class_head.weight"] == shapes["value_head.weight"] == (1, 32)
    assert torch.equal(read("value_head.weight", whole((1, 32))), score)
    assert torch.equal(hub.load(tmp_path)(x), model(x))
    assert config.tied


def test_a_critic_is_a_sequence_classifier_too(tmp_path: Path) -> None:
    model, score = drawn(), torch.randn(1, 32)
    hub.save_weights(model.config, [*model.state_dict().items(), ("value_head.weight", score)], tmp_path, classes=1)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["score.weight"], score)


def test_their_untied_classifier_loads_without_a_language_head(tmp_path: Path) -> None:
    """Of an untied base they write no lm_head: the body and the score are all there is."""
    config = replace(TINY, tied=False)
    theirs = drawn_theirs(config, transformers.LlamaForSequenceClassification, num_labels=3)
    theirs.save_pretrained(tmp_path)
    _, read, shapes = hub.read_folder(tmp_path)
    assert "head.weight" not in shapes
    assert "value_head.weight" not in shapes
    ours, x = hub.load(tmp_path), tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.model(x).last_hidden_state, rtol=0, atol=1e-5)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(37, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor lm_head\.weight"):
        hub.load(tmp_path)
    assert torch.equal(read("class_head.weight", whole((3, 32))), theirs.score.weight.detach())


def test_sharded_folders_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, x = drawn_theirs(TINY), tokens(2, 9)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = hub.load(tmp_path / "theirs")
    monkeypatch.setattr(hub, "_SHARD_BYTES", 10_000)
    hub.save(ours, tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "ours" / "model.safetensors").exists()
    with torch.no_grad():
        assert torch.equal(theirs_at(tmp_path / "ours")(x).logits, theirs(x).logits)
        assert torch.equal(hub.load(tmp_path / "ours")(x), ours(x))
    monkeypatch.undo()
    hub.save(ours, tmp_path / "ours")  # over the parts of before
    assert [file.name for file in (tmp_path / "ours").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_tied_matrix_stored_twice_and_stored_frequencies_are_passed_over(tmp_path: Path) -> None:
    model = drawn()
    hub.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(hub.load(tmp_path)(tokens(1, 4)), model(tokens(1, 4)))


def test_a_published_folder_without_the_prefix_and_with_its_triangles(tmp_path: Path) -> None:
    """As GPT-2's own: h.0.attn.c_attn.weight, and in h.0.attn.bias a mask."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4)).eval()
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): x for name, x in stored.items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    assert "h.0.attn.c_attn.bias" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    ours, x = hub.load(tmp_path), tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(x)), theirs(x).logits, rtol=0, atol=1e-5)


Spoil = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
SPOILED: list[tuple[Spoil, type[FrameworkError], str]] = [
    (lambda t, c: t.pop("model.norm.weight"), CheckpointError, "missing tensor model.norm.weight"),
    (lambda t, c: t.update(extra=torch.ones(1)), CheckpointError, "unexpected tensor extra"),
    (
        lambda t, c: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
        CheckpointError,
        "unexpected tensor model.layers.2.input_layernorm.weight",
    ),
    (
        lambda t, c: t.update({"model.norm.weight": torch.ones(31)}),
        CheckpointError,
        r"model.norm.weight has shape \[31\], config.json says \[32\]",
    ),
    (lambda t, c: c.update(num_hidden_layers=4), CheckpointError, "missing tensor .*, and 13 more"),
    (lambda t, c: c.update(rope_parameters={"rope_type": "longrope"}), UsageError, "rope scaling 'longrope'"),
    (
        lambda t, c: c.update(rope_parameters={"rope_type": "dynamic"}),
        UsageError,
        "rope scaling 'dynamic' does not say its factor",
    ),
    (
        lambda t, c: c.update(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}),
        UsageError,
        "rope scaling 'dynamic' with alpha=1000.0",
    ),
    (
        lambda t, c: c.update(rope_parameters=None, rope_scaling={"type": "linear"}),
        UsageError,
        "rope scaling 'linear' does not say its factor",
    ),
    (
        lambda t, c: c.update(rope_parameters={"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}),
        UsageError,
        "rope scaling 'yarn' with mscale=0.7",
    ),
    (lambda t, c: c.update(hidden_act="gelu"), UsageError, "hidden_act=gelu"),
    (lambda t, c: c.update(quantization_config={"bits": 4}), UsageError, "quantization_config"),
    (lambda t, c: c.update(attention_dropout=0.1), UsageError, "attention_dropout=0.1"),
    (lambda t, c: c.update(model_type="lama"), UsageError, "type 'lama': did you mean 'llama'"),
    (lambda t, c: c.pop("hidden_size"), UsageError, "does not say hidden_size"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILED, ids=[message for _, _, message in SPOILED])
def test_a_folder_that_is_not_the_model_it_claims(
    spoil: Spoil, error: type[FrameworkError], message: str, tmp_path: Path
) -> None:
    hub.save(drawn(), tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        hub.load(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model folder"):
        hub.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        hub.load(tmp_path)
    hub.save(drawn(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        hub.load(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"only pytorch_model\.bin: a pickle can run code when it is read"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is not JSON"):
        hub.load(tmp_path)


def test_a_hub_name_goes_through_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub.save(drawn(), tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert isinstance(hub.load("some/model"), Transformer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match="some/model is neither a folder nor a model that the hub would give: offline"):
        hub.load("some/model")


def offline(name: str, allow_patterns: list[str]) -> str:
    raise OSError("offline")


def test_what_the_layout_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"Llama layout cannot hold model\.activation=gelu; it would be read as swiglu"
    ):
        hub.save(drawn(replace(TINY, activation=Activation.GELU)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
