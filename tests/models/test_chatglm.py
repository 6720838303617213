"""ChatGLM-6B: its forward worked out anew in plain torch, 2-D positions by hand, its folder, what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.core.errors import UsageError
from framework.generation.config import GenerationConfig
from framework.generation.native import NativeGenerator
from framework.models import hub
from framework.models.config import Activation, Architecture, Bias, ModelConfig, Norm, NormPlace, Position
from framework.models.families.chatglm import CHATGLM
from framework.models.init import parameter_shapes
from framework.models.kv_cache import KVCache
from framework.models.positions import rotary_tables, turn
from framework.models.presets import preset
from tests.models.drawn import drawn, tokens

CONFIG = ModelConfig(
    Architecture.PREFIX, family="chatglm", vocab_size=37, hidden_size=24, num_layers=3, num_heads=3,
    intermediate_size=42, max_positions=64, position=Position.ROTARY_2D, norm=Norm.LAYER, norm_place=NormPlace.SCALED,
    activation=Activation.GELU_TANH, attention_bias=Bias.ALL, mlp_bias=True,
)  # fmt: skip
#                    a  b  M  d  M  S  e  f  S  c
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 4, 4, 4, 2, 2]])
SPANS = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 3, 1, 2]])
PREFIX = torch.tensor([5])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def turned(x: Tensor, place: int) -> Tensor:
    """One half of one head of one token, [size]: pair (i, i + size/2) by place x 10000^(-2i/size)."""
    half = len(x) // 2
    y = torch.empty_like(x)
    for i in range(half):
        angle = place * 10000.0 ** (-2 * i / len(x))
        a, b = x[i], x[i + half]
        y[i], y[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return y


def worked_out(theirs: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits [T,V] of one row from tensors by their names: token by token and head by head."""
    h, alpha, heads = theirs["transformer.word_embeddings.weight"][x], math.sqrt(2 * 3), 3
    for layer in range(3):

        def of(name: str, layer: int = layer) -> tuple[Tensor, Tensor]:
            return theirs[f"transformer.layers.{layer}.{name}.weight"], theirs[
                f"transformer.layers.{layer}.{name}.bias"
            ]

        normed = layer_norm(h, *of("input_layernorm"))
        weight, bias = of("attention.query_key_value")
        mixed = (normed @ weight.T + bias).view(len(x), heads, 3, 8)
        attended = torch.zeros(len(x), heads, 8, dtype=h.dtype)
        for head in range(heads):
            q, k, v = mixed[:, head].unbind(1)
            q, k = (
                torch.stack(
                    [
                        torch.cat((turned(row[:4], int(POSITIONS[0, t])), turned(row[4:], int(SPANS[0, t]))))
                        for t, row in enumerate(rows)
                    ]
                )
                for rows in (q, k)
            )
            for t in range(len(x)):
                seen = [s for s in range(len(x)) if s <= t or s < 5]
                weights = torch.softmax(torch.stack([q[t] @ k[s] for s in seen]) / math.sqrt(8), 0)
                attended[t, head] = sum(w * v[s] for w, s in zip(weights, seen, strict=True))
        weight, bias = of("attention.dense")
        h = alpha * normed + attended.flatten(1) @ weight.T + bias
        normed = layer_norm(h, *of("post_attention_layernorm"))
        (up, up_bias), (down, down_bias) = of("mlp.dense_h_to_4h"), of("mlp.dense_4h_to_h")
        inner = normed @ up.T + up_bias
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        h = alpha * normed + inner @ down.T + down_bias
    final = theirs["transformer.final_layernorm.weight"], theirs["transformer.final_layernorm.bias"]
    return layer_norm(h, *final) @ theirs["transformer.word_embeddings.weight"].T


def test_logits_are_those_of_a_model_worked_out_anew(tmp_path: Path) -> None:
    """Through the folder, so that the table of tensors is held as well: q, k and v lie head by head in theirs."""
    hub.save(drawn(CONFIG, dtype=torch.float64), tmp_path)
    theirs, x = load_file(tmp_path / "model.safetensors"), tokens(1, 10)
    ours = hub.load(tmp_path)
    got = ours.logits(ours(x, positions=POSITIONS, span_positions=SPANS, prefix_lengths=PREFIX))
    torch.testing.assert_close(got[0], worked_out(theirs, x[0]), rtol=0, atol=1e-10)


def test_two_kinds_of_positions_by_hand() -> None:
    """A head of 8: its first four numbers turn by the place in the text, its last four by that in the span."""
    config = ModelConfig(Architecture.PREFIX, vocab_size=9, hidden_size=8, num_heads=1, position=Position.ROTARY_2D)
    x = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float64).view(1, 1, 1, 8)
    text, span = (rotary_tables(torch.tensor([[n]]), config, torch.float64) for n in (3, 1))
    tables = (torch.cat((text[0], span[0]), -1), torch.cat((text[1], span[1]), -1))
    expected = [math.cos(3), 0, math.sin(3), 0, math.cos(1), 0, math.sin(1), 0]
    assert turn(x, tables, False, 2).flatten().tolist() == pytest.approx(expected)


def test_a_folder_comes_back_and_the_head_may_be_stored_twice(tmp_path: Path) -> None:
    model = drawn(CONFIG)
    hub.save(model, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["model_type"], said["architectures"], said["inner_hidden_size"]) == ("chatglm", ["ChatGLMModel"], 42)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["transformer.word_embeddings.weight"].clone()
    stored["transformer.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    back = hub.load(tmp_path)
    assert back.config.explicit() == CONFIG.explicit()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_the_published_size() -> None:
    shapes = parameter_shapes(preset("chatglm-6b")).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == 6_173_286_400


def test_what_came_later_under_the_same_name_is_refused() -> None:
    with pytest.raises(UsageError, match="of ChatGLM2, ChatGLM3 or GLM-4"):
        CHATGLM.config_from({"multi_query_attention": True, "num_layers": 28})
    with pytest.raises(UsageError, match="position_encoding_2d=False"):
        CHATGLM.config_from({**CHATGLM.config_to(CONFIG), "position_encoding_2d": False})


def test_what_two_kinds_of_positions_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="takes no cache"):
        drawn(CONFIG)(tokens(1, 3), cache=KVCache(CONFIG, 1, 8).view())
    with pytest.raises(UsageError, match="one kind of positions"):
        NativeGenerator(CONFIG, GenerationConfig(), (0,))
    with pytest.raises(UsageError, match=r"rotary_2d goes with model\.architecture=prefix"):
        ModelConfig(vocab_size=9, position=Position.ROTARY_2D)
    with pytest.raises(UsageError, match="an even number in each half"):
        ModelConfig(Architecture.PREFIX, vocab_size=9, hidden_size=6, num_heads=1, position=Position.ROTARY_2D)
