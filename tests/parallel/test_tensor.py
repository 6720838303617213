"""Tensor styles: even and uneven parts, and log-probs over a shared-out vocabulary that equal those over the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cuda_ext import dispatch, library
from cuda_ext.linear_log_probs import op, reference, token_loss
from framework.core.records import Metrics
from framework.core.runtime import Runtime
from framework.parallel import tensor
from framework.parallel.apply import Plan, apply
from framework.parallel.collectives import Ranks
from framework.parallel.config import ParallelConfig
from framework.parallel.mesh import Mesh, build_mesh
from framework.parallel.tensor import (
    VocabularyLogProbs,
    all_places,
    columns,
    own_places,
    places,
    rows,
    span,
    vocabulary,
)
from tests.distributed import run_ranks

VOCAB, WIDTH, LABELS = 37, 6, 11


class Place:
    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("size", "ranks"), [(37, 4), (8, 4), (5, 5), (3, 4)])
def test_spans_tile_and_differ_by_one_at_most(size: int, ranks: int) -> None:
    spans = [span(size, Place(rank, ranks)) for rank in range(ranks)]  # type: ignore[arg-type]
    assert [first for first, _ in spans] == [sum(length for _, length in spans[:rank]) for rank in range(ranks)]
    assert sum(length for _, length in spans) == size
    lengths = [length for _, length in spans]
    assert max(lengths) - min(lengths) <= 1


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, labels, what the scores are weighted with)."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=random, dtype=torch.float64) for n in (LABELS, VOCAB))
    labels, weights = torch.randint(VOCAB, (LABELS,), generator=random), torch.randn(2, LABELS, generator=random)
    return hidden, weight, torch.randn(VOCAB, generator=random, dtype=torch.float64), labels, weights


def _log_probs(runtime: Runtime, temperature: float, chunk: int) -> dict[str, Tensor]:
    import framework.parallel.tensor as module

    module._CHUNK_LOGITS = chunk
    ranks = build_mesh(ParallelConfig("tp", tensor=0), runtime).ranks("tensor")
    hidden, weight, bias, labels, weights = tensors()
    first, length = span(VOCAB, ranks)
    mine, added = (x[first : first + length].clone().requires_grad_() for x in (weight, bias))
    hidden.requires_grad_()
    score = VocabularyLogProbs(temperature, VOCAB, ranks)
    log_probs, entropy = score(hidden, mine, added, labels, VOCAB, True)
    assert entropy is not None
    (log_probs * weights[0] + entropy * weights[1]).sum().backward()
    assert hidden.grad is not None
    assert mine.grad is not None
    assert added.grad is not None
    whole = ranks.sum(hidden.grad, "the gradient, which is a sum over the vocabulary")
    scores = {"log_probs": log_probs.detach(), "entropy": entropy.detach()}
    return scores | {"hidden": whole, "weight": mine.grad, "bias": added.grad}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1 << 25, 8])  # whole, and in pieces that are computed again
def test_log_probs_entropy_and_gradients_are_those_of_the_whole_vocabulary(
    ranks: int, temperature: float, chunk: int
) -> None:
    hidden, weight, bias, labels, weights = tensors()
    hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    log_probs, entropy = reference.linear_log_probs(
        hidden, weight, labels, bias, temperature=temperature, vocab_size=VOCAB, with_entropy=True
    )
    assert entropy is not None
    (log_probs * weights[0] + entropy * weights[1]).sum().backward()
    found = run_ranks(_log_probs, ranks, temperature, chunk)
    for rank in found:
        for name, whole in (("log_probs", log_probs), ("entropy", entropy), ("hidden", hidden.grad)):
            torch.testing.assert_close(rank[name], whole, rtol=1e-12, atol=1e-12)
    for name, whole in (("weight", weight.grad), ("bias", bias.grad)):
        torch.testing.assert_close(torch.cat([rank[name] for rank in found]), whole, rtol=1e-12, atol=1e-12)


def _clipped(log_probs: Tensor, entropy: Tensor | None, rows: Tensor) -> tuple[Tensor, Metrics]:
    assert entropy is not None
    ratio = (log_probs - rows).exp()
    return -(ratio.clamp(0.5, 2.0) + 0.1 * entropy).sum() / LABELS, {
        "ratio": (ratio.detach().sum(), ratio.new_ones(()))
    }


def _by_kernels(runtime: Runtime) -> dict[str, Tensor]:
    """The pointwise loss, chunk by chunk and through all log-probs, and their gradients, on the emulator in fp32.

    Shards of 18 and 19 rows would go in chunks of 4 and 5 labels, and not be gathered equally often, if each chose
    alone."""
    for module in (op, token_loss, tensor):
        module.rows_of = lambda vocabulary: 4 + vocabulary % 2  # type: ignore[attr-defined]
    ranks = build_mesh(ParallelConfig("tp", tensor=0), runtime).ranks("tensor")
    hidden, weight, bias, labels, weights = (x.float() if x.is_floating_point() else x for x in tensors())
    first, length = span(VOCAB, ranks)
    mine, added = (x[first : first + length].clone().requires_grad_() for x in (weight, bias))
    leaves = [hidden.requires_grad_(), mine, added]
    score = VocabularyLogProbs(0.7, VOCAB, ranks)
    found = {}
    with dispatch.use("emulator"):
        scores = score(hidden, mine, added, labels, VOCAB, True)
        whole = _clipped(*scores, weights[0] - 3)  # type: ignore[arg-type]
        chunked = score(hidden, mine, added, labels, VOCAB, True, _clipped, weights[0] - 3)
        for name, (loss, metrics) in {"whole": whole, "chunked": chunked}.items():
            found[f"{name} loss"], found[f"{name} ratio"] = loss.detach(), metrics["ratio"][0]
            gradients = torch.autograd.grad(loss, leaves)
            found[f"{name} hidden"] = ranks.sum(gradients[0], "the gradient, which is a sum over the vocabulary")
            found |= {f"{name} weight": gradients[1], f"{name} bias": gradients[2]}
    return found | {"log_probs": scores[0].detach(), "entropy": scores[1].detach()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_emulated_a_pointwise_loss_over_shards_is_that_of_the_whole_vocabulary(ranks: int) -> None:
    hidden, weight, bias, labels, weights = tensors()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    log_probs, entropy = reference.linear_log_probs(hidden, weight, labels, bias, 0.7, VOCAB, True)
    loss, metrics = _clipped(log_probs, entropy, weights[0] - 3)
    assert 0 < int(((log_probs - weights[0] + 3).exp() > 2).sum()) < LABELS, "some are clipped"
    exact = dict(zip(("hidden", "weight", "bias"), torch.autograd.grad(loss, leaves), strict=True))
    library.emulator()  # by this process, for all
    found = run_ranks(_by_kernels, ranks)
    for rank in found:
        assert torch.equal(rank["chunked loss"], rank["whole loss"])
        torch.testing.assert_close(rank["log_probs"].double(), log_probs, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(rank["entropy"].double(), entropy, rtol=2e-6, atol=2e-6)
    for way in ("chunked", "whole"):
        for rank in found:
            torch.testing.assert_close(rank[f"{way} loss"].double(), loss, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(rank[f"{way} ratio"].double(), metrics["ratio"][0], rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(rank[f"{way} hidden"].double(), exact["hidden"], rtol=1e-5, atol=1e-6)
        for name in ("weight", "bias"):
            cut = torch.cat([rank[f"{way} {name}"] for rank in found])
            torch.testing.assert_close(cut.double(), exact[name], rtol=1e-5, atol=1e-6)


class Block(nn.Module):
    """A norm, two matrices and what the styles are for; 7 inner columns go over 2 ranks unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.place = nn.Embedding(8, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.ModuleDict({"up": nn.Linear(WIDTH, 7), "down": nn.Linear(7, WIDTH)})

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids) + self.place(torch.arange(ids.shape[1]).unsqueeze(0)))
        return x + self.inner["down"](torch.tanh(self.inner["up"](x)))


STYLES = {
    "embedding": vocabulary,
    "place": own_places,
    "norm": places,
    "inner.up": columns,
    "inner.down": rows,
}


def _block(runtime: Runtime) -> dict[str, Any]:
    torch.manual_seed(0)
    whole = Block().double()
    ids = torch.randint(VOCAB, (3, 8))
    (whole(ids) * torch.arange(8).view(1, 8, 1)).sum().backward()
    mesh = build_mesh(ParallelConfig("tp", tensor=0), runtime)
    ranks = mesh.ranks("tensor")
    cut = Block().double()
    parts = apply(cut, Plan([], {**STYLES, "inner.up": _gathering}), mesh)
    for name, parameter in cut.named_parameters():
        box = tuple(slice(offset, offset + length) for offset, length in parts[name].box)
        parameter.data.copy_(whole.get_parameter(name).detach()[box])
    mine = torch.arange(8).view(1, 8, 1).chunk(ranks.size, dim=1)[ranks.rank]
    (cut(ids) * mine).sum().backward()
    far = {}
    for name, parameter in cut.named_parameters():
        assert parameter.grad is not None
        gradient = ranks.sum(parameter.grad, name) if parts[name].summed_over else parameter.grad
        box = tuple(slice(offset, offset + length) for offset, length in parts[name].box)
        expected = whole.get_parameter(name).grad
        assert expected is not None
        far[name] = float((gradient - expected[box]).abs().max())
    return {"far": far, "speaks": {name: part.speaks for name, part in parts.items()}, "rank": ranks.rank}


def _gathering(module: nn.Module, ranks: Ranks) -> Any:
    """Columns that gather their input's places themselves; a block does it for all its matrices at once."""
    return columns(module, ranks) | all_places(module, ranks)


def test_every_gradient_is_whole_or_says_over_what_it_must_be_summed() -> None:
    for rank in run_ranks(_block, 2):
        assert max(rank["far"].values()) < 1e-12, rank["far"]
        whole = {"place.weight", "norm.weight", "norm.bias", "inner.down.bias"}
        assert {name for name, speaks in rank["speaks"].items() if not speaks} == (whole if rank["rank"] else set())


def test_alone_a_style_changes_nothing() -> None:
    torch.manual_seed(0)
    module, ids = Block(), torch.arange(6).view(2, 3)
    before = module(ids)
    apply(module, Plan([], STYLES), Mesh())
    for name, parameter in module.named_parameters():
        assert parameter.shape == Block().get_parameter(name).shape
    assert module(ids).shape == before.shape
