"""Adapters against PEFT's own, in both directions; merging; what is no adapter of this model is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from framework.core.errors import CheckpointError, UsageError
from framework.models import hub
from framework.models.adapters import save_adapter
from framework.models.config import LoraConfig
from framework.models.init import fill
from framework.models.layers import Linear
from framework.models.lora import LoraLinear, attach, lora_shapes, merged, plus, row_squares, targets
from framework.models.transformer import Transformer
from tests.models.drawn import TINY, drawn, tokens

peft = pytest.importorskip("peft")
LORA = LoraConfig(rank=3, alpha=5.0, rslora=True, targets=["q", "v", "down"], also=["norm"])
DORA = replace(LORA, dora=True)
both = pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])


def low_rank(lora: LoraConfig = LORA) -> dict[str, Tensor]:
    """A and B, both drawn, and lengths about 1."""
    torch.manual_seed(1)
    shapes = lora_shapes(TINY, lora)
    return {name: torch.randn(shape) * 0.1 + (len(shape) == 1) for name, shape in shapes.items()}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(base, adapter by us)."""
    return written(tmp_path, LORA)


def written(tmp_path: Path, lora: LoraConfig) -> tuple[Path, Path]:
    """(base, adapter by us), the final norm in full."""
    base = drawn()
    hub.save(base, tmp_path / "base")
    whole = {"norm.weight": torch.full((32,), 0.7)}
    save_adapter(
        tmp_path / "adapter", str(tmp_path / "base"), lora, low_rank(lora), whole, hub.pieces_of(TINY), "CAUSAL_LM"
    )
    return tmp_path / "base", tmp_path / "adapter"


def with_adapter(base: Path, lora: LoraConfig) -> Transformer:
    """Ours, unmerged."""
    config, read, _ = hub.read_folder(base)
    extra = low_rank(lora) | {"norm.weight": torch.full((32,), 0.7)}
    with torch.device("meta"):
        model = Transformer(config)
        attach(model, lora)
    return fill(model, lambda name, box: extra[name].clone() if name in extra else read(name, box))


@both
def test_peft_loads_ours_with_equal_logits_and_gradients(lora: LoraConfig, tmp_path: Path) -> None:
    folders = written(tmp_path, lora)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folders[0])
    theirs = peft.PeftModel.from_pretrained(theirs, folders[1], is_trainable=True).eval()
    ours, x = with_adapter(folders[0], lora), tokens(2, 9)
    a, b = ours.logits(ours(x)), theirs(x).logits
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    inner = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}
    kinds = {"a": "lora_A", "b": "lora_B"} | ({"m": "lora_magnitude_vector"} if lora.dora else {})
    for path in targets(TINY, lora):
        layer, leaf = path.split(".")[1], path.split(".")[-1]
        for kind, name in kinds.items():
            mine = ours.get_parameter(f"{path}.lora_{kind}").grad
            their = f"base_model.model.model.layers.{layer}.{inner[leaf]}.{name}.default.weight"
            torch.testing.assert_close(mine, gradients.pop(their), rtol=1e-4, atol=1e-5)
    assert list(gradients) == ["base_model.model.model.norm.modules_to_save.default.weight"]


@both
def test_merged_equals_unmerged_and_an_adapter_s_folder_is_a_model(lora: LoraConfig, tmp_path: Path) -> None:
    folders = written(tmp_path, lora)
    ours, x = with_adapter(folders[0], lora), tokens(2, 9)
    kept: dict[str, Tensor] = {}
    plain = dict(merged(ours.named_parameters(), targets(TINY, lora), lora, kept))
    assert kept.keys() == lora_shapes(TINY, lora).keys()
    with torch.device("meta"):
        model = Transformer(ours.config)
    model = fill(model, lambda name, box: plain[name].detach())
    loaded = hub.load(folders[1])
    with torch.no_grad():
        expected = ours(x)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5)
        assert (hub.load(folders[0])(x) - expected).abs().max() > 0.01
    _, read, _ = hub.read_folder(folders[1])
    name = "layers.1.mlp.down.weight"
    assert torch.equal(read(name, ((3, 5), (10, 7))), loaded.get_parameter(name)[3:8, 10:17])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_we_load_what_peft_saved(dora: bool, tmp_path: Path) -> None:
    hub.save(drawn(), tmp_path / "base")
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["k_proj", "gate_proj"], init_lora_weights=False, use_dora=dora
    )
    theirs = peft.get_peft_model(base, settings).eval()
    for name, lengths in theirs.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(lengths, 0.5, 2)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, x = hub.load(tmp_path / "adapter"), tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(x)), theirs(x).logits, rtol=0, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = folders[1] / "adapter_config.json"
    said = json.loads(file.read_text())
    for change, error, message in (
        ({"peft_type": "IA3"}, UsageError, "holds an adapter of type IA3; only LORA is read here"),
        ({"lora_bias": True}, UsageError, "says lora_bias=True, which is not computed here"),
        (
            {"base_model_name_or_path": str(tmp_path / "other")},
            CheckpointError,
            r"is for another base than .*\[32, 32\]",
        ),
        (
            {"base_model_name_or_path": str(tmp_path / "gpt")},
            CheckpointError,
            "is for another base than .*, which has no",
        ),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, UsageError, "there is no model folder"),
    ):
        hub.save(drawn(type(TINY)(vocab_size=37, hidden_size=64, num_layers=2, num_heads=4)), tmp_path / "other")
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4)
        ).save_pretrained(tmp_path / "gpt")
        file.write_text(json.dumps(said | change))
        with pytest.raises(error, match=message):
            hub.load(folders[1])


def test_a_target_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"lora\.targets: 'q_proj' is no part of this model: Choose one of: down, gate, k, o"
    ):
        targets(TINY, LoraConfig(rank=1, targets=["q_proj"]))


def test_dora_by_hand() -> None:
    """W + B A = (3, 0) + 2 (0, 2) = (3, 4) has length 5 and shall have 10: twice (3, 4) (1, 1) + bias 1 = 15. The norm
    counts as a constant: dm = 7 / 5, dB = 2 x 2, dA = 2 x 2 (1, 1)."""
    layer = LoraLinear(Linear(2, 1, bias=True), 1, 1.0, dora=True).to_empty(device="cpu")
    for name, value in (("weight", [[3, 0]]), ("bias", [1]), ("lora_a", [[0, 2]]), ("lora_b", [[2]]), ("lora_m", [10])):
        layer.get_parameter(name).data = torch.tensor(value, dtype=torch.float32)
    y = layer(torch.ones(1, 1, 2))
    y.sum().backward()
    assert y.tolist() == [[[15]]]
    expected = {"weight": [[2, 2]], "bias": [1], "lora_a": [[4, 4]], "lora_b": [[4]], "lora_m": [1.4]}
    for name, gradient in expected.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, torch.tensor(gradient, dtype=torch.float32))
    whole = plus(*(layer.get_parameter(name).detach() for name in ("weight", "lora_a", "lora_b")), 1.0, layer.lora_m)
    assert whole.tolist() == [[6, 8]]


def test_the_lengths_of_rows_without_their_sum() -> None:
    torch.manual_seed(0)
    w, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 5), (3, 5), (7, 3)))
    torch.testing.assert_close(row_squares(w, a, b, 0.7), (w + 0.7 * b @ a).square().sum(1), rtol=1e-12, atol=0)
    w = w.bfloat16()
    assert torch.equal(row_squares(w, a.bfloat16(), torch.zeros(7, 3).bfloat16(), 0.7).sqrt(), w.double().norm(dim=1))
