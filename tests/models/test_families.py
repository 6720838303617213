"""Every family against transformers' own: logits, every gradient, padding, packing, decoding, folders both ways.

All parameters are drawn, norms and biases too; sizes are awkward. Bounds are law Layout's measure, the largest
difference over max(largest value, RMS of all): fp32 1e-5 against transformers as it is, fp64 1e-10 where its casts to
fp32 are fp64.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.bloom import modeling_bloom

from framework.models import hub
from framework.models.families import bert, gpt, llama
from framework.models.kv_cache import KVCache
from framework.models.transformer import Transformer
from tests.models.drawn import tokens
from tests.models.exact import InFp64

_GROUPED = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 42, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
_GPT = {"vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64, "pad_token_id": 0}
_BERT = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 42, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_QWEN_MOE = {"moe_intermediate_size": 10, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}
_GLM = {
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 0.5},
}


@dataclass(frozen=True)
class Case:
    """A model of theirs: its family's name and what its configuration says."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        return getattr(transformers, f"{self.name}Config")(**self.settings, **self.plain)

    @property
    def plain(self) -> dict[str, str]:
        """Experts in a loop: torch's grouped product takes no awkward sizes on a CPU."""
        return {"experts_implementation": "eager"} if self.name.endswith("Moe") else {}

    @property
    def language_model(self) -> Any:
        kinds = {"GPT2": "LMHeadModel", "OpenAIGPT": "LMHeadModel", "Bert": "ForMaskedLM"}
        return getattr(transformers, self.name + kinds.get(self.name, "ForCausalLM"))

    def drawn(self) -> Any:
        torch.manual_seed(0)
        return drawn(self.language_model(self.config()))


def drawn(model: Any) -> Any:
    """Every parameter random, at a scale where logits are of order one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0, p.shape[-1] ** -0.5)
            else:
                p.normal_(0 if name.endswith("bias") else 1, 0.3)
    return model.eval()


CASES = {
    "llama": Case("Llama", _GROUPED),
    "llama, all biases, tied, one key head": Case(
        "Llama",
        _GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "llama, linear scaling": Case(
        "Llama", _GROUPED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}
    ),
    "llama 3 scaling": Case("Llama", _GROUPED | {"rope_parameters": _LLAMA3}),
    "llama, yarn": Case("Llama", _GROUPED | {"rope_parameters": _YARN}),
    "llama, yarn, all said": Case(
        "Llama", _GROUPED | {"rope_parameters": _YARN | {"beta_fast": 8, "beta_slow": 2, "attention_factor": 1.3}}
    ),
    "llama, dynamic scaling, within its context": Case("Llama", _GROUPED | {"rope_parameters": _DYNAMIC}),
    "mistral, window 5": Case("Mistral", _GROUPED | {"sliding_window": 5}),
    "mistral": Case("Mistral", _GROUPED | {"sliding_window": None}),
    "qwen2": Case("Qwen2", {k: v for k, v in _GROUPED.items() if k != "head_dim"} | {"tie_word_embeddings": True}),
    "qwen2, window from layer 1": Case(
        "Qwen2",
        {k: v for k, v in _GROUPED.items() if k != "head_dim"}
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": Case("Qwen3", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3, biases, window": Case(
        "Qwen3",
        _GROUPED | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    ),
    "qwen3 moe": Case("Qwen3Moe", _GROUPED | _QWEN_MOE),
    "qwen3 moe, tied, first layer dense, weights as they are, biases": Case(
        "Qwen3Moe",
        _GROUPED
        | _QWEN_MOE
        | {"tie_word_embeddings": True, "mlp_only_layers": [0], "norm_topk_prob": False, "attention_bias": True},
    ),
    "qwen3 moe, experts in every second layer": Case(
        "Qwen3Moe", _GROUPED | _QWEN_MOE | {"num_hidden_layers": 3, "decoder_sparse_step": 2, "num_experts_per_tok": 3}
    ),
    "qwen2 moe, a shared expert with a gate": Case(
        "Qwen2Moe",
        {k: v for k, v in _GROUPED.items() if k != "head_dim"} | _QWEN_MOE | {"shared_expert_intermediate_size": 14},
    ),
    "glm": Case("Glm", _GROUPED | _GLM),
    "glm, no biases": Case("Glm", _GROUPED | _GLM | {"attention_bias": False}),
    "glm4": Case("Glm4", _GROUPED | _GLM),
    "bloom, 3 heads": Case(
        "Bloom", {"vocab_size": 37, "hidden_size": 24, "n_layer": 2, "n_head": 3, "pad_token_id": 0}
    ),
    "bloom, 8 heads, untied": Case(
        "Bloom", {"vocab_size": 37, "hidden_size": 32, "n_layer": 3, "n_head": 8, "tie_word_embeddings": False}
    ),
    "gpt2": Case("GPT2", _GPT | {"n_inner": 50}),
    "gpt2, relu, untied": Case("GPT2", _GPT | {"activation_function": "relu", "tie_word_embeddings": False}),
    "gpt1": Case("OpenAIGPT", _GPT),
    "bert": Case("Bert", _BERT),
    "bert, gelu by tanh": Case("Bert", _BERT | {"hidden_act": "gelu_new"}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DECODERS = {name: case for name, case in CASES.items() if case.name != "Bert"}


def gap(ours: Tensor, theirs: Tensor, rms: float = 0.0) -> float:
    """Law Layout's measure."""
    return float((ours - theirs).detach().abs().max()) / max(float(theirs.detach().abs().max()), rms)


def left_padded(x: Tensor, pads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, mask, positions): row b begins with pads[b] tokens of padding."""
    mask = torch.arange(x.shape[1]) >= torch.tensor(pads).unsqueeze(1)
    return x * mask, mask, (mask.cumsum(1) - 1).clamp(min=0)


def their_logits(model: Any, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    if isinstance(model, transformers.BloomForCausalLM):  # reads positions off the mask
        return model(x, attention_mask=mask.long()).logits
    return model(x, attention_mask=mask.long(), position_ids=positions).logits


@cases
def test_logits_and_every_gradient_in_fp32(case: Case, tmp_path: Path) -> None:
    """Against transformers as it is, rows padded on the left and on the right."""
    theirs = case.drawn()
    theirs.save_pretrained(tmp_path)
    hold(hub.load(tmp_path), theirs, 1e-5)


@cases
def test_logits_and_every_gradient_in_fp64(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # theirs rounds sqrt(2/pi) to eight digits
    monkeypatch.setattr(modeling_bloom.BloomGelu, "forward", lambda self, x: F.gelu(x, approximate="tanh"))
    with InFp64():
        theirs = case.drawn().double()
        theirs.save_pretrained(tmp_path)
        ours = hub.load(tmp_path)
        assert next(ours.parameters()).dtype == torch.float64
        hold(ours, theirs, 1e-10)


def hold(ours: Transformer, theirs: Any, tolerance: float) -> None:
    x, mask, positions = left_padded(tokens(4, 23).clamp(min=1), [0, 9, 0, 3])
    mask[2, 15:] = False  # and one on the right
    # padding sees padding here, nothing there: its own rows are nobody's business
    a = ours.logits(ours(x, positions=positions, document_ids=mask.long()))[mask]
    b = their_logits(theirs, x, mask, positions)[mask]
    hold_outcomes(ours, theirs, a, b, tolerance)


def hold_outcomes(ours: Transformer, theirs: Any, a: Tensor, b: Tensor, tolerance: float) -> None:
    """Our logits and theirs, and every gradient of a random sum of them."""
    assert gap(a, b) <= tolerance
    assert b.std() > 0.3
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(3)).to(a.dtype)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    compare_gradients(ours, theirs, tolerance)


def compare_gradients(ours: Transformer, theirs: Any, tolerance: float) -> None:
    """By the family's own table, so that each of their tensors is met once and whole."""
    found = dict(theirs_of(ours, {name: p.grad for name, p in ours.named_parameters()}))  # type: ignore[misc]
    expected = dict(as_stored((name, p.grad) for name, p in theirs.named_parameters()))
    assert found.keys() == expected.keys()
    everything = torch.cat([g.flatten() for g in expected.values()])
    rms = float(everything.pow(2).mean().sqrt())
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape
        assert gap(found[name], gradient, rms) <= tolerance, name


def as_stored(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Experts, which they hold in one tensor a layer, under the names of their files, one each."""
    for name, x in named:
        module, _, leaf = name.rpartition(".")
        if not module.endswith(".experts"):
            yield name, x
            continue
        for number, expert in enumerate(x):
            kinds = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
            for kind, part in zip(kinds, expert.chunk(len(kinds)), strict=True):
                yield f"{module}.{number}.{kind}_proj.weight", part


def theirs_of(model: Transformer, weights: dict[str, Tensor]) -> Any:
    family = next(f for f in (*llama.FAMILIES, *gpt.FAMILIES, bert.BERT) if f.model_type == model.config.family)
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    return hub.joined(weights.items(), family.pieces(shapes, model.config.num_heads).__getitem__)


@cases
def test_a_folder_comes_back_equal_in_names_types_and_bits(case: Case, tmp_path: Path) -> None:
    theirs = case.drawn().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    hub.save(hub.load(tmp_path / "theirs"), tmp_path / "ours")
    before: dict[str, Tensor] = {}
    for file in (tmp_path / "theirs").glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    back, info = case.language_model.from_pretrained(tmp_path / "ours", output_loading_info=True, **case.plain)
    assert not any(info.values()), info
    first, x = case.language_model.from_pretrained(tmp_path / "theirs", **case.plain), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(back.eval()(x).logits, first.eval()(x).logits)


@cases
def test_packed_documents_equal_theirs_alone(case: Case, tmp_path: Path) -> None:
    theirs = case.drawn()
    theirs.save_pretrained(tmp_path)
    ours, x = hub.load(tmp_path), tokens(1, 20)
    ids = torch.tensor([[1] * 11 + [2] * 6 + [0] * 3])
    places = torch.cat((torch.arange(11), torch.arange(6), torch.zeros(3, dtype=torch.long))).unsqueeze(0)
    with torch.no_grad():
        packed = ours.logits(ours(x, positions=places, document_ids=ids))
        alone = torch.cat((theirs(x[:, :11]).logits, theirs(x[:, 11:17]).logits), dim=1)
    assert gap(packed[:, :17], alone) <= 1e-5


@pytest.mark.parametrize("case", DECODERS.values(), ids=DECODERS.keys())
def test_decoding_from_a_cache_equals_the_full_forward(case: Case, tmp_path: Path) -> None:
    """A prompt in two pieces, then token by token."""
    case.drawn().save_pretrained(tmp_path)
    ours = hub.load(tmp_path, torch.float64)
    x, cache = tokens(2, 16), KVCache(ours.config, 2, 16, torch.float64)
    cuts = [0, 4, 7, *range(8, 17)]
    parts = [
        ours(x[:, a:b], positions=torch.arange(a, b).expand(2, -1), cache=cache.view(used=b))
        for a, b in itertools.pairwise(cuts)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), ours(x), rtol=0, atol=1e-11)


BEYOND = {
    "llama": Case("Llama", _GROUPED | {"rope_parameters": _DYNAMIC, "max_position_embeddings": 12}),
    "glm, half a head": Case(
        "Glm",
        _GROUPED
        | {"eos_token_id": 1, "max_position_embeddings": 12}
        | {"rope_parameters": _DYNAMIC | {"partial_rotary_factor": 0.5}},
    ),
}


@pytest.mark.parametrize("case", BEYOND.values(), ids=BEYOND.keys())
@pytest.mark.parametrize("length", [11, 12, 13, 23])
def test_dynamic_scaling_around_the_original_context(case: Case, length: int, tmp_path: Path) -> None:
    """Logits and every gradient, rows of one length: by it they turn. A folder says no more than the factor."""
    theirs = case.drawn()
    theirs.save_pretrained(tmp_path)
    ours, x = hub.load(tmp_path), tokens(3, length).clamp(min=1)  # theirs learns nothing of padding
    hold_outcomes(ours, theirs, ours.logits(ours(x)), theirs(x).logits, 1e-5)
    torch.set_default_dtype(torch.float64)  # theirs divides whole numbers: the base
    try:
        with InFp64():
            theirs = case.drawn().double()
            theirs.save_pretrained(tmp_path)
            ours = hub.load(tmp_path)
            hold_outcomes(ours, theirs, ours.logits(ours(x)), theirs(x).logits, 1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


def test_dynamic_scaling_goes_by_each_document_of_a_row(tmp_path: Path) -> None:
    """Three documents in one row, and two rows of other lengths in one batch: each as theirs alone, by a model that has
    seen no other (theirs remembers the longest)."""
    case = BEYOND["llama"]
    case.drawn().save_pretrained(tmp_path)
    ours, x = hub.load(tmp_path), tokens(2, 47)
    sizes = ([20, 9, 15], [12, 35])
    ids = torch.zeros_like(x)
    places = torch.zeros_like(x)
    for b, row in enumerate(sizes):
        ids[b, : sum(row)] = torch.cat([torch.full((n,), i) for i, n in enumerate(row, 1)])
        places[b, : sum(row)] = torch.cat([torch.arange(n) for n in row])
    with torch.no_grad():
        found = ours.logits(ours(x, positions=places, document_ids=ids))
        for b, row in enumerate(sizes):
            alone = [case.drawn()(part.unsqueeze(0)).logits[0] for part in x[b, : sum(row)].split(row)]
            assert gap(found[b, : sum(row)], torch.cat(alone)) <= 1e-5
