"""Packed rows without a mask: the whole model's logits and gradients are the mask's, and what needs a mask keeps it.

A library for packed rows is played by a stand-in (`tests.cuda_ext.standing_in`).
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from cuda_ext import dispatch
from cuda_ext.attention import flash
from framework.models.config import Architecture, ModelConfig
from framework.models.transformer import Transformer
from tests.cuda_ext import packed
from tests.cuda_ext.standing_in import standing_in
from tests.models.drawn import LATER_AXES, TINY, drawn, tokens

IDS = torch.tensor([[1, 1, 1, 1, 2, 2, 3, 3, 3, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3]])
PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 0]])
PACKS = {
    "grouped heads": TINY,
    "window of the last layer": LATER_AXES["window, norms of q and k"],
    "window of all layers": replace(TINY, window=3),
    "window as long as a row": replace(TINY, window=11),
    "capped scores": LATER_AXES["sinusoidal, capped scores"],
    "encoder": replace(TINY, architecture=Architecture.ENCODER),
    "prefix, of which nothing is said": replace(TINY, architecture=Architecture.PREFIX),
}
MASKS = {"alibi": LATER_AXES["alibi, norm of the embedding"], "relative": LATER_AXES["relative, unscaled"]}


def run(config: ModelConfig, within: AbstractContextManager[Any], strict: bool = False, **inputs: Tensor) -> Any:
    """(logits of what is no padding, gradients, how often packed rows were asked of the library)."""
    model = drawn(config, strict=strict, dtype=torch.float64)
    with within:
        logits = model.logits(model(tokens(2, 11), **inputs))
        real = logits[inputs["document_ids"] > 0] if "document_ids" in inputs else logits
        real.square().sum().backward()
        library = sys.modules.get("flash_attn")
        calls = sum(call["packed"] for call in library.CALLS) if library else 0
    return real, [parameter.grad for parameter in model.parameters()], calls


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-11)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", PACKS.values(), ids=PACKS)
def test_logits_and_gradients_are_the_masks(config: ModelConfig) -> None:
    inputs = {"positions": PLACES, "document_ids": IDS}
    ours, theirs = run(config, standing_in("flash_2"), **inputs), run(config, nullcontext(), **inputs)
    same(ours, theirs)
    assert (ours[2], theirs[2]) == (config.num_layers, 0)


def test_rows_of_one_document_and_a_window_are_told_too() -> None:
    config = replace(TINY, window=4, window_from=1)
    ours, theirs = run(config, standing_in("flash_2")), run(config, nullcontext())
    same(ours, theirs)
    assert ours[2] == 1  # the first layer's whole rows need neither mask nor documents


@pytest.mark.parametrize("config", MASKS.values(), ids=MASKS)
def test_numbers_added_to_scores_keep_their_mask(config: ModelConfig) -> None:
    inputs = {"positions": PLACES, "document_ids": IDS}
    ours = run(config, standing_in("flash_2"), **inputs)
    same(ours, run(config, nullcontext(), **inputs))
    assert ours[2] == 0


def test_strict_mode_prefixes_and_scattered_documents_keep_theirs() -> None:
    inputs = {"positions": PLACES, "document_ids": IDS}
    scattered = inputs | {"document_ids": IDS.where(IDS != 3, 1)}
    prefix = replace(TINY, architecture=Architecture.PREFIX)
    for config, strict, told in (
        (TINY, True, inputs),
        (prefix, False, inputs | {"prefix_lengths": torch.full_like(IDS, 2)}),
        (TINY, False, scattered),
    ):
        ours = run(config, standing_in("flash_2"), strict, **told)
        same(ours, run(config, nullcontext(), strict, **told))
        assert ours[2] == 0


def test_what_a_plan_puts_in_place_of_the_mask_is_what_its_cores_are_given() -> None:
    class Ids(nn.Module):
        def forward(self, document_ids: Tensor) -> Tensor:
            return document_ids

    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
            assert mask is IDS
            return q

    model = drawn(TINY)
    model.mask = Ids()  # type: ignore[assignment]
    for layer in model.layers.values():
        layer.attention.core = Core()  # type: ignore[union-attr]
    with standing_in("flash_2"):
        model(tokens(2, 11), positions=PLACES, document_ids=IDS)


def test_without_a_card_masks_are_what_they_were() -> None:
    views = []
    model = drawn(TINY)
    model.layers["0"].register_forward_pre_hook(lambda _, inputs: views.append(inputs[1].whole))
    model(tokens(2, 11), positions=PLACES, document_ids=IDS)
    assert views[0].documents is None
    assert views[0].mask.shape == (2, 1, 11, 11)
    with standing_in("flash_2"):
        model(tokens(2, 11), positions=PLACES, document_ids=IDS)
        model.strict = True
        model(tokens(2, 11), positions=PLACES, document_ids=IDS)
    assert views[2].documents is None
    assert views[1].mask is None
    assert views[1].documents.starts.tolist() == [0, 4, 6, 9, 11, 13, 21, 22, 22]


@torch.library.custom_op("tests::packed", mutates_args=())
def _packed(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    return packed.packed(q, k, v, starts, longest, None, True, (-1, -1), 0.0)


@_packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    return torch.empty_like(q)


def _traced(q: Tensor, k: Tensor, v: Tensor, **words: Any) -> Tensor:
    return _packed(q, k, v, words["cu_seqlens_q"], words["max_seqlen_q"])


def batches() -> Iterator[Tensor]:
    """Of 1 to 60 documents, so that numbers and lengths are other ones each time."""
    for number in (3, 9, 1, 30, 17, 60, 5, 44):
        yield torch.arange(64).mul(number).floor_divide(64).view(1, 64) + 1


def test_a_compiled_block_is_not_compiled_again_for_every_batch() -> None:
    model: Transformer = drawn(replace(TINY, num_layers=1))
    counter = CompileCounter()
    compiled = drawn(replace(TINY, num_layers=1))
    compiled.layers["0"].compile(backend=counter, fullgraph=True)
    with standing_in("flash_2"), torch.no_grad():
        assert isinstance(flash.pick((9, 0), torch.float32, 8, False, False), flash.Version)
        flash.LOADED[2] = (_traced, _traced)
        for ids in batches():
            ours = compiled(tokens(1, 64), document_ids=ids)
            torch.testing.assert_close(ours, model(tokens(1, 64), document_ids=ids))
    assert counter.frame_count == 2  # the second with its numbers left open


def test_a_compiled_block_goes_around_what_cannot_be_traced() -> None:
    model, compiled = drawn(replace(TINY, num_layers=1)), drawn(replace(TINY, num_layers=1))
    compiled.layers["0"].compile(backend="eager")
    with standing_in("flash_3", "apex"), dispatch.preferring(norm="apex"):
        for ids in batches():
            ours, theirs = (part(tokens(1, 64), document_ids=ids) for part in (compiled, model))
            torch.testing.assert_close(ours, theirs)
        for part in (ours, theirs):
            part.sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
