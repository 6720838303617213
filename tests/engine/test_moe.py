"""The balance of experts in an engine: any split of a batch, what is computed again, and the formula, from outside."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from framework.core.errors import UsageError
from framework.core.records import Rows, count
from framework.engine.config import EngineConfig, Precision
from framework.engine.flops import layer_weights
from framework.engine.metrics import means
from framework.engine.plan import check
from framework.models.config import ModelConfig, MoeConfig
from framework.models.init import fill, random_weights
from framework.models.moe import Mixture
from framework.models.scorer import Scorer
from framework.models.transformer import Transformer
from framework.parallel.config import ParallelConfig, Recompute
from tests.engine.cases import build, deviation, gradients, language_loss, padded, pairs, ranking_loss, rollout

MOE = MoeConfig(experts=5, top_k=2, intermediate_size=7, balance=0.5)
MODEL = ModelConfig(vocab_size=37, hidden_size=24, num_layers=2, num_heads=3, num_kv_heads=1, init_std=0.3, moe=MOE)
FP64 = EngineConfig(precision=Precision.FP64)


def pulled(
    rows: Rows, micro_size: int, again: Recompute = Recompute.NONE, model: ModelConfig = MODEL
) -> dict[str, Tensor]:
    """Every gradient of one step, and the balance that it reports."""
    heads = {"num_classes": 1} if rows.__class__.__name__ == "PreferenceBatch" else {}
    engine = build(None, ParallelConfig(recompute=again), FP64, model, micro_size, **heads)
    figures = means(engine.forward_backward(rows, ranking_loss if heads else language_loss))
    return gradients(engine) | {"balance": torch.tensor(figures.get("balance", 0.0), dtype=torch.float64)}


def test_any_split_of_a_batch_gives_the_same_gradient() -> None:
    """Rows of unequal lengths, 1 to 7 a micro-batch, the last one filled up with empty rows."""
    rows = padded(7)
    whole = pulled(rows, 7)
    for micro_size in (1, 2, 4):
        assert deviation(pulled(rows, micro_size), whole) <= 1e-12
    assert deviation(pulled(rows, 7, model=replace(MODEL, moe=replace(MOE, balance=0.0))), whole) > 1e-3


@pytest.mark.parametrize("again", [Recompute.FULL, Recompute.SELECTIVE])
def test_what_is_computed_again_is_pulled_at_once(again: Recompute) -> None:
    rows = padded(5)
    assert deviation(pulled(rows, 2, again), pulled(rows, 2)) <= 1e-12


@pytest.mark.parametrize("rows", [padded(4), rollout(4), pairs(3)], ids=["tokens", "rollout", "pairs"])
def test_the_gradient_is_that_of_the_loss_with_the_balance_in_it(rows: Rows) -> None:
    """Both added up in the open, by autograd, from probabilities that a hook hands out. A pair is two sequences."""
    is_pairs = len(rows.inputs()) > len(rows)
    with torch.device("meta"):
        scorer = Scorer(Transformer(MODEL), num_classes=int(is_pairs))
    fill(scorer.model, random_weights(MODEL, 7), torch.float64)
    if scorer.class_head is not None:
        weight = random_weights(MODEL, 7)("class_head.weight", ((0, 1), (0, 24)))
        scorer.class_head.weight = torch.nn.Parameter(weight.double())
    routers: list[Tensor] = []
    balances: list[Tensor] = []
    for layer in scorer.model.layers.values():
        assert isinstance(layer.mlp, Mixture)
        layer.mlp.router.register_forward_hook(lambda module, inputs, logits: routers.append(logits))
    loss, _ = (ranking_loss if is_pairs else language_loss)(scorer(rows), rows, count(rows))
    real = rows.inputs().document_ids > 0
    for logits in routers:
        for b in range(len(real)):
            p = logits[b][real[b]].softmax(-1)
            f = torch.nn.functional.one_hot(p.topk(2).indices, 5).sum(1).double().mean(0) * 5 / 2
            balances.append((f * p.mean(0)).sum())
    loss = loss + 0.5 / len(real) * torch.stack(balances).sum()
    loss.backward()
    expected = {name.removeprefix("model."): p.grad for name, p in scorer.named_parameters() if p.grad is not None}
    expected["balance"] = torch.stack(balances).mean()
    assert 1 < float(expected["balance"]) < 2
    assert deviation(pulled(rows, 2), expected) <= 1e-12


def test_torch_counts_the_flops_of_a_mixture() -> None:
    """Attention's matrices left out. All 24 tokens choose alike, so that no expert's rows are filled up to eights."""
    config = replace(MODEL, moe=replace(MOE, shared=9, shared_gate=True))
    part, x = Transformer(config).layers["0"].mlp, torch.randn(2, 12, 24)
    assert isinstance(part, Mixture)
    torch.nn.init.zeros_(part.router.weight)
    with FlopCounterMode(display=False) as counter:
        part(x)
    own = layer_weights(config, 0) - 24 * 8 * 2 * (3 + 1)
    assert own == 24 * (5 + 1 + 3 * (2 * 7 + 9))
    assert counter.get_total_flops() == 24 * 2 * own


def test_what_does_not_go_with_experts_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"model\.moe\.balance=0\.5 does not go with parallel\.context=2"):
        check(MODEL, ParallelConfig("cp", context=2), EngineConfig(), 2)
    with pytest.raises(UsageError, match=r"engine\.compile=true does not go with model\.moe\.experts=5"):
        check(MODEL, ParallelConfig(), EngineConfig(compile=True), 1)
