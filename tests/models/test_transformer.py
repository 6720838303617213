"""The transformer: axes against transformers' own models, documents kept apart, the future unseen, cuts, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from framework.core.errors import UsageError
from framework.models.config import Activation, Bias, ModelConfig, Norm, NormPlace, Position
from framework.models.transformer import Transformer
from tests.models.drawn import LATER_AXES, TINY, drawn, positions, tokens

GPT2 = ModelConfig(
    vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, max_positions=24, position=Position.LEARNED,
    norm=Norm.LAYER, activation=Activation.GELU_TANH, attention_bias=Bias.ALL, mlp_bias=True,
)  # fmt: skip
AXES = {
    "rotary rms pre swiglu grouped": TINY,
    "untied": replace(TINY, tied=False),
    "wide heads": replace(TINY, head_dim=16),
    "biases": replace(TINY, attention_bias=Bias.ALL, mlp_bias=True),
    "learned layer-norm gelu_tanh": GPT2,
    "post-norm": replace(GPT2, norm_place=NormPlace.POST),
    "no positions, relu, one key head": replace(
        TINY, position=Position.NONE, activation=Activation.RELU, num_kv_heads=1
    ),
    "gelu": replace(TINY, activation=Activation.GELU),
    **LATER_AXES,
}


@pytest.mark.parametrize("activation", [Activation.GELU_TANH, Activation.GELU, Activation.RELU])
def test_equals_gpt2_of_transformers(activation: Activation) -> None:
    """Learned positions, layer norm in front, biases, a plain feed-forward block, tied."""
    config = replace(GPT2, activation=activation)
    ours, names = drawn(config, dtype=torch.float64), {Activation.GELU_TANH: "gelu_new"}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=37,
            n_positions=24,
            n_embd=32,
            n_layer=2,
            n_head=4,
            layer_norm_epsilon=config.norm_eps,
            activation_function=names.get(activation, activation.value),
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    assert_equal(ours, theirs, "transformer.{}", ("wte.weight", "wpe.weight"), ("ln_1", "ln_2"), "transformer.ln_f")


def test_equals_gpt_of_transformers() -> None:
    """The same with norms behind the residual sum and none at the end (Radford et al. 2018)."""
    ours = drawn(replace(GPT2, norm_place=NormPlace.POST), dtype=torch.float64)
    theirs = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(
            vocab_size=37, n_positions=24, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=GPT2.norm_eps, afn="gelu"
        )
    )
    outer = ("tokens_embed.weight", "positions_embed.weight")
    assert_equal(ours, theirs, "transformer.{}", outer, ("ln_1", "ln_2"), None)


def assert_equal(
    ours: Transformer,
    theirs: torch.nn.Module,
    inside: str,
    outer: tuple[str, str],
    norms: tuple[str, str],
    final: str | None,
) -> None:
    theirs = theirs.double().eval()
    own, new = ours.state_dict(), {}
    new[inside.format(outer[0])] = new["lm_head.weight"] = own["embedding.weight"]
    new[inside.format(outer[1])] = own["position_embedding.weight"]
    for i in range(ours.config.num_layers):
        here, there = f"layers.{i}.", inside.format(f"h.{i}.")
        for leaf in ("weight", "bias"):
            new[f"{there}{norms[0]}.{leaf}"] = own[f"{here}attention_norm.{leaf}"]
            new[f"{there}{norms[1]}.{leaf}"] = own[f"{here}mlp_norm.{leaf}"]
            joined = torch.cat([own[f"{here}attention.{x}.{leaf}"] for x in "qkv"])
            new[f"{there}attn.c_attn.{leaf}"] = transposed(joined)
            pairs = (("attn.c_proj", "attention.o"), ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down"))
            for name, mine in pairs:
                new[f"{there}{name}.{leaf}"] = transposed(own[f"{here}{mine}.{leaf}"])
    if final:
        new |= {f"{final}.{leaf}": own[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    theirs.load_state_dict(new)
    x = tokens(3, 11)
    torch.testing.assert_close(ours.logits(ours(x)), theirs(x).logits, rtol=0, atol=1e-10)


def transposed(x: Tensor) -> Tensor:
    """Their Conv1D holds a matrix the other way round; a bias is as it is."""
    return x.mT if x.dim() == 2 else x


def test_without_positions_a_later_token_sees_a_set() -> None:
    """Position.NONE: in one layer, the last token's state does not change when the tokens before it change places."""
    model = drawn(replace(TINY, position=Position.NONE, num_layers=1), dtype=torch.float64)
    x = tokens(1, 6)
    shuffled = torch.cat((x[:, [3, 0, 4, 2, 1]], x[:, 5:]), 1)
    torch.testing.assert_close(model(x)[:, -1], model(shuffled)[:, -1], rtol=0, atol=1e-12)
    rotary = drawn(replace(TINY, num_layers=1), dtype=torch.float64)
    assert (rotary(x)[:, -1] - rotary(shuffled)[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("config", AXES.values(), ids=AXES.keys())
def test_packed_equals_unpacked_with_gradients(config: ModelConfig, strict: bool) -> None:
    """Two documents and padding in one row, against each alone: states and every gradient (fp64)."""
    model = drawn(config, strict, torch.float64)
    x = tokens(1, 12)
    ids = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    packed = model(x, positions=places, document_ids=ids)
    alone = torch.cat((model(x[:, :5]), model(x[:, 5:9])), 1)
    torch.testing.assert_close(packed[:, :9], alone, rtol=0, atol=1e-12)
    assert torch.isfinite(packed).all()
    weights = torch.randn(alone.shape, dtype=torch.float64)
    grads = [torch.autograd.grad((h * weights).sum(), list(model.layers.parameters())) for h in (packed[:, :9], alone)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("config", AXES.values(), ids=AXES.keys())
def test_right_padding_is_not_seen(config: ModelConfig) -> None:
    """Without document_ids: what stands behind a row's text changes nothing in it, and stays finite."""
    model = drawn(config, dtype=torch.float64)
    x = tokens(2, 9)
    padded = torch.cat((x, torch.zeros(2, 4, dtype=torch.long)), 1)
    hidden = model(padded)
    torch.testing.assert_close(hidden[:, :9], model(x), rtol=0, atol=1e-12)
    assert torch.isfinite(hidden).all()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("config", AXES.values(), ids=AXES.keys())
def test_no_token_sees_the_future_and_each_sees_its_past(config: ModelConfig, documents: bool) -> None:
    """Changing token 6 leaves states 0..5 as they are, bit for bit, and moves 6 and 7; gradients say the same. How many
    rows an expert has does change: they have their bits in strict mode."""
    model = drawn(config, strict=config.moe.experts > 0)
    x = tokens(1, 8)
    ids = torch.ones_like(x) if documents else None
    other = x.clone()
    other[0, 6] = (x[0, 6] + 1) % 37
    a, b = model(x, document_ids=ids), model(other, document_ids=ids)
    assert torch.equal(a[:, :6], b[:, :6])
    assert ((a[:, 6:] - b[:, 6:]).abs().amax(-1) > 1e-4).all()
    assert model.embedding is not None
    embedded = model.embedding(x).detach().requires_grad_()
    model.embedding = None
    (grad,) = torch.autograd.grad(model(embedded, document_ids=ids)[0, 5].sum(), embedded)
    assert (grad[0, 6:] == 0).all()
    assert (grad[0, :6].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("config", AXES.values(), ids=AXES.keys())
def test_two_pipeline_cuts_make_one_model(config: ModelConfig) -> None:
    """The first half without norm and head, the second without embedding: one after the other, the whole's bits."""
    x = tokens(2, 7)
    expected = drawn(config)(x)
    first, second = drawn(config), drawn(config)
    del first.layers["1"]
    first.norm = first.head = None
    del second.layers["0"]
    second.embedding = second.position_embedding = second.embedding_norm = None
    assert torch.equal(second(first(x)), expected)


def test_a_part_without_head_and_embedding_has_no_logits() -> None:
    part = drawn(replace(TINY, tied=True))
    part.embedding = None
    with pytest.raises(ValueError, match="neither head nor embedding"):
        part.logits(torch.zeros(1, 1, 32))


@pytest.mark.parametrize("config", AXES.values(), ids=AXES.keys())
def test_builds_and_runs_on_the_meta_device(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
        if not config.moe.experts:  # how long each expert's part is stands in the numbers, which are not there
            assert model.logits(model(torch.zeros(2, 9, dtype=torch.long))).shape == (2, 9, 37)
    assert not list(model.buffers())
    assert all(p.is_meta for p in model.parameters())


def test_names_are_the_contract() -> None:
    with torch.device("meta"):
        model = Transformer(replace(TINY, num_layers=1, tied=False, attention_bias=Bias.ALL))
    inner = ["attention_norm.weight", *(f"attention.{x}.{leaf}" for x in "qkvo" for leaf in ("weight", "bias"))]
    inner += ["mlp_norm.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"]
    expected = ["embedding.weight", *(f"layers.0.{name}" for name in inner), "norm.weight", "head.weight"]
    assert [name for name, _ in model.named_parameters()] == expected


def test_head_counts_are_read_off_the_shapes() -> None:
    """Half the heads, as a column-parallel rank holds them: the sum of both halves' outputs is the whole's."""
    model = drawn(replace(TINY, num_layers=1), dtype=torch.float64)
    x = tokens(1, 6)
    attention: Any = model.layers["0"].attention
    seen: list[tuple[Tensor, ...]] = []
    hook = attention.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
    model(x)
    hook.remove()
    (states, context, whole) = seen[0]
    parts = []
    for half in range(2):
        rank: Any = drawn(replace(TINY, num_layers=1), dtype=torch.float64).layers["0"].attention
        for name, rows in (("q", 16), ("k", 8), ("v", 8)):
            linear = getattr(rank, name)
            linear.weight = torch.nn.Parameter(linear.weight[half * rows : (half + 1) * rows])
        rank.o.weight = torch.nn.Parameter(rank.o.weight[:, half * 16 : (half + 1) * 16])
        parts.append(rank(states, context))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-12)


def test_the_attention_core_can_be_exchanged() -> None:
    class Silent(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
            return torch.zeros_like(q)

    model = drawn()
    layers: list[Any] = list(model.layers.values())
    for layer in layers:
        assert not list(layer.attention.core.parameters())
        layer.attention.core = Silent()
    x = tokens(1, 5)
    alone = model(x[:, 4:])
    torch.testing.assert_close(model(x)[:, 4:], alone)  # without attention a token knows itself alone


@pytest.mark.parametrize("name", ["token_types", "prefix_lengths", "encoder_tokens"])
def test_inputs_of_other_families_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"takes no {name}"):
        drawn()(tokens(1, 3), **{name: torch.zeros(1, 3)})


def test_a_model_without_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="vocab_size=0"):
        Transformer(replace(TINY, vocab_size=0))


def test_strict_mode_refuses_sizes_whose_bits_depend_on_the_batch() -> None:
    for config, message in (
        (replace(TINY, hidden_size=36, head_dim=8), "model.hidden_size=36 to be a multiple of 8; choose 40"),
        (replace(TINY, head_dim=10), "model.head_dim=10 to be a multiple of 8; choose 16"),
        (replace(TINY, intermediate_size=42), "model.intermediate_size=42 to be a multiple of 8; choose 48"),
    ):
        with pytest.raises(UsageError, match=message):
            Transformer(config, strict=True)


def test_positions_default_to_counting() -> None:
    model, x = drawn(GPT2), tokens(2, 7)
    assert torch.equal(model(x), model(x, positions=positions(2, 7)))
    assert not torch.allclose(model(x), model(x, positions=positions(2, 7) + 1))


@pytest.mark.parametrize("strict", [False, True])
def test_compiles_as_one_graph(strict: bool) -> None:
    model, x = drawn(strict=strict), tokens(2, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, document_ids=torch.ones_like(x)), model(x), rtol=0, atol=1e-5)
