"""Adapters of matrices that a family joins with others, against PEFT's own in both directions."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.core.errors import CheckpointError, UsageError
from framework.models import hub
from framework.models.adapters import save_adapter
from framework.models.config import LoraConfig
from framework.models.init import fill
from framework.models.lora import attach, lora_shapes, targets
from framework.models.transformer import Transformer
from tests.models.drawn import tokens
from tests.models.test_families import CASES, Case

peft = pytest.importorskip("peft")
KINDS = [("a", "lora_A"), ("b", "lora_B"), ("m", "lora_magnitude_vector")]
SIZE, INNER = 24, 42  # of the models in CASES


def thirds(part: int) -> Tensor:
    """q, k or v, one whole after another."""
    return torch.arange(SIZE) + part * SIZE


def by_head(part: int) -> Tensor:
    """q, k or v of a head of size 8, then those of the next."""
    return torch.arange(3 * SIZE).view(3, 3, SIZE // 3)[:, part].flatten()


def halves(part: int) -> Tensor:
    return torch.arange(INNER) + part * INNER


@dataclass(frozen=True)
class Joined:
    """A family that holds `parts` of ours in the rows `rows(part)` of `theirs`, and `alone` in one of its own."""

    case: Case
    theirs: str
    parts: str
    rows: Callable[[int], Tensor]
    alone: tuple[str, str]  # ours, theirs


JOINED = {
    "gpt2": Joined(
        CASES["gpt2"], "h.{}.attn.c_attn", "attention.q attention.k attention.v", thirds, ("o", "h.{}.attn.c_proj")
    ),
    "bloom": Joined(
        CASES["bloom, 3 heads"],
        "h.{}.self_attention.query_key_value",
        "attention.q attention.k attention.v",
        by_head,
        ("down", "h.{}.mlp.dense_4h_to_h"),
    ),
    "glm": Joined(
        CASES["glm"], "layers.{}.mlp.gate_up_proj", "mlp.gate mlp.up", halves, ("o", "layers.{}.self_attn.o_proj")
    ),
}
joined = pytest.mark.parametrize("family", JOINED.values(), ids=JOINED.keys())


def lora_of(family: Joined, parts: list[int], **settings: Any) -> LoraConfig:
    names = [family.parts.split()[part].partition(".")[2] for part in parts]
    return LoraConfig(rank=3, alpha=5.0, targets=[*names, family.alone[0]], **settings)


def saved(folder: Path, family: Joined, lora: LoraConfig) -> dict[str, Tensor]:
    """Write base/ and adapter/; what the adapter holds, all of it drawn."""
    family.case.drawn().save_pretrained(folder / "base")
    config, _, _ = hub.read_folder(folder / "base")
    torch.manual_seed(1)
    shapes = lora_shapes(config, lora)
    held = {name: torch.randn(shape) * 0.2 + (len(shape) == 1) for name, shape in shapes.items()}
    save_adapter(folder / "adapter", str(folder / "base"), lora, held, {}, hub.pieces_of(config), "CAUSAL_LM")
    return held


def unmerged(base: Path, lora: LoraConfig, held: dict[str, Tensor]) -> Transformer:
    config, read, _ = hub.read_folder(base)
    with torch.device("meta"):
        model = Transformer(config)
        attach(model, lora)
    return fill(model, lambda name, box: held[name].clone() if name in held else read(name, box))


def by_peft(folder: Path, family: Joined) -> Any:
    """Their model with the adapter, loaded without a complaint."""
    base = family.case.language_model.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()


@joined
@pytest.mark.parametrize("kind", ["one, lora", "one, rslora", "all, lora", "all, rslora", "all, dora"])
def test_peft_loads_ours_with_equal_logits_and_gradients(family: Joined, kind: str, tmp_path: Path) -> None:
    number, _, word = kind.partition(", ")
    parts = [1] if number == "one" else list(range(len(family.parts.split())))
    lora = lora_of(family, parts, **({} if word == "lora" else {word: True}))
    ours = unmerged(tmp_path / "base", lora, saved(tmp_path, family, lora))
    theirs, x = by_peft(tmp_path, family), tokens(2, 9)
    a, b = ours.logits(ours(x)), theirs(x).logits
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    base = hub.load(tmp_path / "base")
    assert (base.logits(base(x)) - a).abs().max() > 0.1
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    kinds = KINDS if lora.dora else KINDS[:2]
    expected = their_gradients(family, parts, kinds, gradients, ours.config.num_layers)
    assert expected.keys() == lora_shapes(ours.config, lora).keys()
    assert not gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-3)


def their_gradients(
    family: Joined, parts: list[int], kinds: list[tuple[str, str]], gradients: dict[str, Any], layers: int
) -> dict[str, Tensor]:
    """By our names; what is taken is taken out of `gradients`."""
    found = {}
    for layer in range(layers):
        for kind, name in kinds:
            end = f"{name}.default.weight"

            def pop(path: str, end: str = end, layer: int = layer) -> Any:
                return gradients.pop(next(x for x in gradients if x.endswith(f"{path.format(layer)}.{end}")))

            both = pop(family.theirs)
            for number, part in enumerate(parts):
                columns = slice(3 * number, 3 * number + 3)
                here = both[columns] if kind == "a" else both[family.rows(part)]
                here = here[:, columns] if kind == "b" else here
                found[f"layers.{layer}.{family.parts.split()[part]}.lora_{kind}"] = here
            block = "mlp" if family.alone[0] == "down" else "attention"
            found[f"layers.{layer}.{block}.{family.alone[0]}.lora_{kind}"] = pop(family.alone[1])
    return found


@joined
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_of_joined_matrices_is_a_model_box_by_box(family: Joined, dora: bool, tmp_path: Path) -> None:
    lora = lora_of(family, list(range(len(family.parts.split()))), dora=dora)
    ours = unmerged(tmp_path / "base", lora, saved(tmp_path, family, lora))
    loaded, x = hub.load(tmp_path / "adapter"), tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), ours(x), rtol=0, atol=1e-4)
    _, read, _ = hub.read_folder(tmp_path / "adapter")
    for path in targets(ours.config, lora):
        weight = loaded.get_parameter(f"{path}.weight")
        assert torch.equal(read(f"{path}.weight", ((5, 9), (3, 7))), weight[5:14, 3:10])


@joined
def test_we_load_what_peft_saved(family: Joined, tmp_path: Path) -> None:
    """Dense B: no part of theirs is one of ours; ranks and alphas differ by module; DoRA, lengths of their own."""
    base = family.case.drawn()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    leaf, other = family.theirs.rpartition(".")[2], family.alone[1].rpartition(".")[2]
    settings = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=[leaf, other], init_lora_weights=False,
        rank_pattern={leaf: 5}, alpha_pattern={f"1.*{other}": 3, leaf: 7}, fan_in_fan_out=family.case.name == "GPT2",
        use_dora=True,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, settings).eval()
    for name, lengths in theirs.named_parameters():
        if "magnitude" in name:
            torch.nn.init.uniform_(lengths, 0.5, 2)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, x = hub.load(tmp_path / "adapter"), tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(x)), theirs(x).logits, rtol=0, atol=1e-4)


def test_what_peft_is_told_names_no_module_without_an_adapter(tmp_path: Path) -> None:
    """GPT-2 has two c_proj; two parts of rank 3 are one of rank 6, whose scale stays 5 / 3."""
    family = JOINED["gpt2"]
    saved(tmp_path, family, lora_of(family, [0, 2]))
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["attn.c_attn", "attn.c_proj"]
    assert said["rank_pattern"] == {"attn.c_attn": 6}
    assert said["alpha_pattern"]["attn.c_attn"] == pytest.approx(10)


def test_an_adapter_of_another_size_is_named(tmp_path: Path) -> None:
    saved(tmp_path, JOINED["gpt2"], lora_of(JOINED["gpt2"], [0]))
    Case("GPT2", CASES["gpt2"].settings | {"n_embd": 48}).drawn().save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"its adapter of transformer.h.0.attn.c_attn.weight makes \[72, 24\]"):
        hub.load(tmp_path / "adapter")


def test_a_joined_matrix_learns_in_full_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    family, lora = JOINED["gpt2"], LoraConfig(rank=2, targets=["o"], also=["layers.0.attention"])
    family.case.drawn().save_pretrained(tmp_path / "base")
    config, read, _ = hub.read_folder(tmp_path / "base")
    places = hub.pieces_of(config)
    whole = {
        f"layers.0.attention.{x}.{leaf}": torch.randn((SIZE, SIZE) if leaf == "weight" else (SIZE,))
        for x in "qkv"
        for leaf in ("weight", "bias")
    }
    save_adapter(tmp_path / "adapter", str(tmp_path / "base"), lora, {}, whole, places, "CAUSAL_LM")
    _, read, _ = hub.read_folder(tmp_path / "adapter")
    for name, tensor in whole.items():
        box = ((2, 7), (3, 4))[: tensor.dim()]
        assert torch.equal(read(name, box), tensor[tuple(slice(start, start + length) for start, length in box)])
    with pytest.raises(UsageError, match=r"lora\.also names a part of what the family holds as one: parts of"):
        save_adapter(
            tmp_path / "none", "base", lora, {}, {k: x for k, x in whole.items() if ".k." not in k}, places, "CAUSAL_LM"
        )


def test_dora_of_some_of_what_is_joined_has_no_place(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"lora\.dora adapts some of the matrices that are one in transformer\.h\.0\.attn"
    ):
        saved(tmp_path, JOINED["gpt2"], lora_of(JOINED["gpt2"], [0, 2], dora=True))
