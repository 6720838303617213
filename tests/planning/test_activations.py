"""The formula against what a real forward keeps: storages that autograd saved, less the parameters, each once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from cuda_ext import dispatch
from framework.core.records import TokenBatch, count
from framework.models.config import Activation, Bias, ModelConfig, MoeConfig, Norm, NormPlace, Position
from framework.models.scorer import Scorer
from framework.models.transformer import Transformer
from framework.parallel.config import Recompute
from framework.parallel.recompute import recompute
from framework.planning.activations import (
    CHUNK_LOGITS,
    Load,
    block_kept,
    block_working,
    head_kept,
    head_working,
    shared_kept,
)
from framework.stages.pretrain import token_loss

LLAMA = ModelConfig(vocab_size=300, hidden_size=64, num_layers=3, num_heads=8, num_kv_heads=4, intermediate_size=160)
GPT = ModelConfig(
    vocab_size=101, hidden_size=48, num_layers=2, num_heads=3, norm=Norm.LAYER, activation=Activation.GELU, tied=False,
    position=Position.LEARNED, attention_bias=Bias.ALL, mlp_bias=True,
)  # fmt: skip
POST = ModelConfig(vocab_size=101, hidden_size=64, num_layers=2, norm_place=NormPlace.POST, activation=Activation.RELU)
MOE = ModelConfig(
    vocab_size=101, hidden_size=64, num_layers=2, num_heads=4, moe=MoeConfig(experts=6, top_k=3, intermediate_size=48)
)
SHAPES = [(4, 32), (2, 96)]  # rows, places


def kept(model: ModelConfig, rows: int, length: int, dtype: torch.dtype, again: Recompute) -> int:
    """Bytes that hooks see saved by a forward with its loss; selective recomputation's cache they do not see."""
    with torch.device("meta"):
        scorer = Scorer(Transformer(model)).to(dtype)
    torch._foreach_zero_(
        [parameter.data for parameter in scorer.to_empty(device="cpu").parameters()]
    )  # their values do not matter
    for layer in scorer.model.layers.values():
        recompute(layer, again)
    tokens = torch.randint(model.vocab_size, (rows, length))
    places, every = torch.arange(length).expand(rows, length), torch.ones(rows, length, dtype=torch.bool)
    batch = TokenBatch(tokens, tokens, every, places, every.long())
    own = {parameter.untyped_storage().data_ptr() for parameter in scorer.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage  # held, so that no other can stand at its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scorer(batch, token_loss=lambda log_probs, _, rows: token_loss(log_probs, None, rows, count(batch)))
    return sum(storage.nbytes() for storage in seen.values())


def formula(model: ModelConfig, load: Load, again: Recompute) -> int:
    """Where blocks are computed again, their shared tables are held by Python, where hooks do not look."""
    shared = shared_kept(model, load, again) if again is Recompute.NONE else 0
    return model.num_layers * block_kept(model, load, again) + shared + head_kept(model, load)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("model", [LLAMA, GPT, POST, MOE], ids=["llama", "gpt", "post", "moe"])
def test_a_forward_keeps_what_the_formula_says(model: ModelConfig, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for again in (Recompute.NONE, Recompute.FULL):
        by_formula = formula(model, Load(*shape, compute=dtype.itemsize), again)
        assert kept(model, *shape, dtype, again) == pytest.approx(
            by_formula, rel=0.02 if again is Recompute.NONE else 0.04
        ), again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["llama", "gpt"])
def test_emulated_kernels_keep_less(model: ModelConfig, dtype: torch.dtype) -> None:
    for again in (Recompute.NONE, Recompute.FULL):
        with dispatch.use("emulator"):
            saved = kept(model, 4, 32, dtype, again)
        by_formula = formula(model, Load(4, 32, compute=dtype.itemsize, kernel=True, fused_norms=True), again)
        assert saved == pytest.approx(by_formula, rel=0.02 if again is Recompute.NONE else 0.04), again


@pytest.mark.parametrize("model", [LLAMA, GPT, POST, MOE], ids=["llama", "gpt", "post", "moe"])
def test_selective_recomputation_keeps_what_products_gave(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks do not see its cache, which torch makes for each block."""
    caches: list[Any] = []

    def watched(policy: Any) -> Any:
        both = create_selective_checkpoint_contexts(policy)
        caches.append(both[0])
        return both

    monkeypatch.setattr("framework.parallel.recompute.create_selective_checkpoint_contexts", watched)
    for shape in SHAPES:
        caches.clear()
        saved = kept(model, *shape, torch.float32, Recompute.SELECTIVE)
        tensors = [leaf for cache in caches for leaf in pytree.tree_leaves(dict(cache.storage)) if _is_held(leaf)]
        cached = {held.val.untyped_storage().data_ptr(): held.val.untyped_storage().nbytes() for held in tensors}
        by_formula = formula(model, Load(*shape), Recompute.SELECTIVE)
        assert saved + sum(cached.values()) == pytest.approx(by_formula, rel=0.03)


def _is_held(leaf: Any) -> bool:
    """Whether it is torch's wrapper of a tensor in such a cache."""
    return isinstance(getattr(leaf, "val", None), Tensor)


def test_a_block_by_hand() -> None:
    model = ModelConfig(vocab_size=10, hidden_size=8, num_heads=2, num_kv_heads=1, intermediate_size=12)
    p, e = 2 * 4, 4
    norms = 2 * p * (2 * 8 + 1) * e
    attention = p * (8 + 4 + 4) * e + p * 8 * e + p * 2 * e + 2 * 4 * 4 * e  # q, k, v, output, log-sum-exp, mask
    assert block_kept(model, Load(2, 4), Recompute.NONE) == norms + 2 * p * 8 * e + attention + 4 * p * 12 * e
    assert block_kept(model, Load(2, 4), Recompute.FULL) == p * 8 * e
    products = p * (8 + 4 + 4 + 8 + 2 * 12 + 8) * e + p * (8 + 2) * e
    assert block_kept(model, Load(2, 4), Recompute.SELECTIVE) == p * 8 * e + products


def test_tensor_and_context_ranks_share_it_out_by_hand() -> None:
    """Two tensor ranks halve all but what the matrices take in; two context ranks halve the places."""
    model = ModelConfig(vocab_size=10, hidden_size=8, num_heads=2, intermediate_size=12)
    one, taken = block_kept(model, Load(2, 8, packed=False), Recompute.NONE), 2 * 16 * 8 * 4
    assert block_kept(model, Load(2, 8, packed=False, tensor=2), Recompute.NONE) == (one - taken) // 2 + taken
    assert block_kept(model, Load(2, 8, context=2), Recompute.NONE) == one // 2
    assert block_kept(model, Load(2, 8, context=2, ring=False), Recompute.NONE) == one // 2 + 2 * 8 * 8 * 4


def test_logits_are_kept_up_to_a_chunk() -> None:
    model = ModelConfig(vocab_size=1 << 15)
    few, many = Load(1, 1024), Load(1, 1025)
    assert head_kept(model, few) - 1024 * 4 * (3 * 128 + 1) == CHUNK_LOGITS * 4
    assert head_kept(model, many) == 1025 * 4 * (3 * 128 + 1)
    assert (head_working(model, few), head_working(model, many)) == (2 * CHUNK_LOGITS * 4, 3 * CHUNK_LOGITS * 4)


def test_what_is_computed_again_stands_beside() -> None:
    none, full = (block_kept(LLAMA, Load(2, 32), again) for again in (Recompute.NONE, Recompute.FULL))
    beside = [block_working(LLAMA, Load(2, 32), again) for again in (Recompute.NONE, Recompute.FULL)]
    assert beside[1] - beside[0] == none - full
