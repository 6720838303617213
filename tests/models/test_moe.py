"""Experts: a router by hand, transformers' formula of balance, no token dropped, strict bits, any split of a batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from framework.core.errors import UsageError
from framework.models.adapters import Adapter, LowRank, save_adapter
from framework.models.config import Activation, LoraConfig, ModelConfig, MoeConfig
from framework.models.families.llama import FAMILIES
from framework.models.hub import pieces_of
from framework.models.init import random_weights
from framework.models.lora import targets
from framework.models.moe import Mixture, balance_gradient
from framework.models.transformer import Transformer
from tests.models.drawn import TINY, drawn, tokens

MOE = replace(TINY, moe=MoeConfig(experts=6, top_k=3, intermediate_size=24, shared=16, shared_gate=True))


def mixture(config: ModelConfig, strict: bool = False, dtype: torch.dtype = torch.float64) -> Mixture:
    part = drawn(config, strict, dtype).layers["1"].mlp
    assert isinstance(part, Mixture)
    return part


def test_a_router_by_hand() -> None:
    """Logits ln 1, ln 2, ln 4, ln 1: p = 1/8, 1/4, 1/2, 1/8. The two heaviest are experts 2 and 1."""
    config = replace(TINY, moe=MoeConfig(experts=4, top_k=2, normalise=False))
    part = Mixture(config, strict=False).double()
    x = torch.zeros(1, 1, 32, dtype=torch.float64)
    x[..., 0] = 1
    with torch.no_grad():
        part.router.weight.zero_()[:, 0] = torch.tensor([1.0, 2.0, 4.0, 1.0], dtype=torch.float64).log()
    for normalise, expected in ((False, [1 / 2, 1 / 4]), (True, [2 / 3, 1 / 3])):
        part.normalise = normalise
        weights, chosen = part.route(x)
        assert chosen.flatten().tolist() == [2, 1]
        torch.testing.assert_close(weights.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", [Activation.SWIGLU, Activation.GEGLU])
def test_no_token_is_dropped_however_many_choose_one_expert(activation: Activation) -> None:
    """Every token through each of its experts, one at a time; all of them choose expert 5 first."""
    part = mixture(replace(MOE, activation=activation))
    act = F.silu if activation is Activation.SWIGLU else F.gelu
    x = torch.randn(3, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[..., 0] = 1
    with torch.no_grad():
        part.router.weight[5, 0] = 50.0
    weights, chosen = part.route(x)
    assert (chosen[..., 0] == 5).all()
    y = part(x)
    gate, up, down = (stack.weight for stack in (part.experts.gate, part.experts.up, part.experts.down))
    assert part.shared is not None
    assert part.shared_gate is not None
    for b, t in torch.cartesian_prod(torch.arange(3), torch.arange(7)).tolist():
        token, total = x[b, t], torch.zeros(32, dtype=torch.float64)
        for weight, e in zip(weights[b, t], chosen[b, t], strict=True):
            total = total + weight * (down[e] @ (act(gate[e] @ token) * (up[e] @ token)))
        total = total + torch.sigmoid(part.shared_gate(token)) * part.shared(token)
        torch.testing.assert_close(y[b, t], total, rtol=0, atol=1e-12)


def test_an_expert_that_nobody_chose_gets_a_gradient_of_zero() -> None:
    part = mixture(MOE)
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    idle = sorted(set(range(6)) - set(part.route(x)[1].flatten().tolist()))
    part(x).sum().backward()
    for stack in (part.experts.gate, part.experts.up, part.experts.down):
        assert stack.weight.grad is not None
        assert (stack.weight.grad[idle] == 0).all()


def test_strict_a_row_has_its_bits_whatever_else_is_in_the_batch() -> None:
    """Decoding with the trainer's bits stands in test_kv_cache."""
    part = mixture(MOE, strict=True, dtype=torch.float32)
    x = torch.randn(95, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        whole = part(x.unsqueeze(0))[0]
        for first, count in [(first, count) for first in (0, 3, 17) for count in (1, 2, 7, 8, 23, 64)]:
            some = slice(first, first + count)
            assert torch.equal(part(x[some].unsqueeze(1)).squeeze(1), whole[some])


def test_strict_and_fused_agree() -> None:
    x = tokens(3, 11)
    plain, strict = (drawn(MOE, strict, torch.float64)(x) for strict in (False, True))
    torch.testing.assert_close(plain, strict, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"experts": 4, "top_k": 5}, r"model\.moe\.top_k=5 must be between 1 and model\.moe\.experts=4"),
        ({"experts": -1}, r"model\.moe\.experts=-1 must not be negative"),
        ({"experts": 4, "every": 0}, r"model\.moe\.every=0 must be at least 1"),
        ({"experts": 4, "balance": -0.1}, r"model\.moe\.balance=-0\.1 must not be negative"),
        ({"experts": 4, "shared_gate": True}, r"model\.moe\.shared_gate=true needs model\.moe\.shared"),
        ({"experts": 4, "first": 2}, r"model\.moe\.first=2 and model\.moe\.every=1 leave none of model\.num_layers=2"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(settings: dict[str, int], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        replace(TINY, moe=MoeConfig(**settings))  # type: ignore[arg-type]


def test_what_experts_lack_is_refused() -> None:
    with pytest.raises(UsageError, match=r"needs a gated model\.activation and model\.mlp_bias=false"):
        replace(MOE, mlp_bias=True)
    with pytest.raises(UsageError, match=r"strict mode needs model\.moe\.intermediate_size=20 to be a multiple of 8"):
        Transformer(replace(MOE, moe=replace(MOE.moe, intermediate_size=20)), strict=True)
    with pytest.raises(UsageError, match=r"the Llama layout cannot hold model\.moe="):
        next(family for family in FAMILIES if family.model_type == "llama").config_to(MOE)


@pytest.mark.parametrize("plain", [[1], [0, 2]])
def test_experts_that_begin_and_end_again_are_refused(plain: list[int]) -> None:
    family = next(family for family in FAMILIES if family.model_type == "qwen3_moe")
    theirs = family.config_to(replace(MOE, family="qwen3_moe", qk_norm=True, moe=MoeConfig(experts=4)))
    with pytest.raises(UsageError, match=r"mlp_only_layers=\[.*\] is not computed here: only the first ones"):
        family.config_from(theirs | {"mlp_only_layers": plain})


def test_an_adapter_takes_attention_alone() -> None:
    leaves = {path.rpartition(".")[2] for path in targets(MOE, LoraConfig(rank=2))}
    assert leaves == {"q", "k", "v", "o"}
    with pytest.raises(UsageError, match=r"lora\.targets: 'down' is not adapted in a model with experts"):
        targets(MOE, LoraConfig(rank=2, targets=["q", "down"]))


def test_an_adapter_of_an_expert_is_refused(tmp_path: Path) -> None:
    config = replace(MOE, family="qwen3_moe", qk_norm=True, moe=MoeConfig(experts=4))
    places = pieces_of(config)
    low_rank = {"model.layers.1.mlp.experts.3.up_proj": LowRank(torch.zeros(2, 32), torch.zeros(40, 2), 1.0)}
    with pytest.raises(UsageError, match=r"adapts model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight, an expert's"):
        Adapter("base", low_rank, {}).over(random_weights(config, 0), places, tmp_path)
    whole = {"layers.1.mlp.experts.up.weight": torch.zeros(4, 40, 32)}
    with pytest.raises(UsageError, match=r"experts\.0\.up_proj\.weight and its like, experts, have no place in an ada"):
        save_adapter(tmp_path / "adapter", "base", LoraConfig(rank=2), {}, whole, places, "CAUSAL_LM")


def test_balance_by_hand() -> None:
    """Two experts, one a token. Row 0: experts 0, 0, 1 and padding; T = 3, f = 2/3 x (2, 1), and each probability
    counts f / T. Row 1: all padding."""
    chosen = torch.tensor([[[0], [0], [1], [1]], [[0], [1], [0], [0]]])
    real = torch.tensor([[True, True, True, False], [False] * 4])
    pull = balance_gradient(torch.full((2, 4, 2), 0.5, dtype=torch.float64), chosen, real)
    expected = torch.zeros(2, 4, 2, dtype=torch.float64)
    expected[0, :3] = torch.tensor([4 / 9, 2 / 9], dtype=torch.float64)
    torch.testing.assert_close(pull, expected, rtol=0, atol=1e-15)
    assert float((pull * 0.5).sum()) == pytest.approx(1)  # even probabilities: 1 a row


def routed(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits[rows, 9, 6], experts chosen by the three heaviest, real places)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 9, 6, dtype=torch.float64, generator=generator).requires_grad_()
    real = torch.arange(9) < torch.randint(4, 9, (rows, 1), generator=generator)
    return logits, logits.softmax(-1).topk(3, -1).indices, real


def ours(logits: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
    """The sum over rows of sum_e f_e P_e."""
    probabilities = logits.softmax(-1)
    return (probabilities * balance_gradient(probabilities.detach(), chosen, real)).sum()


def theirs(logits: Tensor, real: Tensor) -> Tensor:
    """transformers' f counts k choices a token and is not divided by k."""
    loss = load_balancing_loss_func((logits.flatten(0, 1),), 6, 3, real.long())
    assert isinstance(loss, Tensor)
    return loss / 3


@pytest.mark.parametrize("padded", [False, True])
def test_balance_of_one_row_is_transformers_own(padded: bool) -> None:
    logits, chosen, real = routed(1)
    real = real if padded else torch.ones_like(real)
    a, b = ours(logits, chosen, real), theirs(logits, real)
    torch.testing.assert_close(a, b.double(), rtol=0, atol=1e-6)  # theirs adds up in fp32
    for x, y in zip(torch.autograd.grad(a, logits), torch.autograd.grad(b, logits), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


def test_balance_of_a_batch_is_the_sum_over_its_rows_and_switch_s_is_not() -> None:
    logits, chosen, real = routed(4)
    alone = sum(ours(logits[i : i + 1], chosen[i : i + 1], real[i : i + 1]) for i in range(4))
    torch.testing.assert_close(ours(logits, chosen, real), alone, rtol=0, atol=1e-12)
    logits = logits.detach()
    each = sum(float(theirs(logits[i : i + 1], real[i : i + 1])) for i in range(4)) / 4
    assert abs(float(theirs(logits, real)) - each) > 0.01


def test_a_row_has_its_bits_whatever_rows_stand_beside_it() -> None:
    """Law On-policy: not strict, but in one row shape, as the update's and the inference before it."""
    model, x = drawn(MOE), tokens(40, 8)
    with torch.no_grad():
        first = model(x[:2])
        for other in range(2, 40):
            assert torch.equal(model(x[[0, other]])[0], first[0])
            assert torch.equal(model(x[[other, 1]])[1], first[1])
