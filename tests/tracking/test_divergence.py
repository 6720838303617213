"""What is said of two traces: the first step and tensor, by the bits or by the bound; and what a torn file is worth."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from framework.core.errors import FrameworkError
from framework.tracking.divergence import FILE, GRADIENTS, WEIGHTS, Sketch, Trace, by_bits, by_bound, read_traces, torn
from framework.tracking.folder import RunFolder

PLAIN = Sketch(100, {"0": "aa", "1": "bb"}, 1.0, [0.5, -0.25, 1.0, 0.0], [])


def trace(
    gradients: dict[str, Sketch] | None = None, weights: dict[str, Sketch] | None = None, tokens: int = 36
) -> Trace:
    """Of two tensors, as equal as it is told."""
    names = {"layers.0.q": PLAIN, "head": PLAIN}
    return Trace("x", tokens, {GRADIENTS: names | (gradients or {}), WEIGHTS: names | (weights or {})})


def moved(by: float) -> Sketch:
    return replace(PLAIN, hashes={"0": "aa", "1": "cc"}, projections=[0.5 + by, -0.25, 1.0, 0.0])


def test_the_first_step_counts_then_gradients_before_the_weights_that_they_make() -> None:
    left = {step: trace() for step in (0, 1, 2)}
    assert by_bits(left, left) == "the same bits in every tensor on every rank at all 3 common steps"
    both = trace({"head": moved(0.1)}, {"head": moved(0.1), "layers.0.q": moved(0.2)})
    said = by_bits(left, {0: trace(), 1: both, 2: trace()})
    assert said == "first differ at step 1 in the gradient of head, on rank 1"
    weights = trace(None, {"head": moved(0.1), "layers.0.q": moved(0.2)})
    said = by_bits(left, {0: trace(), 1: weights, 2: both})
    assert said == "first differ at step 1 in the weights of layers.0.q, on rank 1, most of 2 tensors there"


def test_the_bound_is_the_error_model_worked_by_hand() -> None:
    """36 tokens and 32 roundings a layer: 4 x 2^-24 x sqrt(68) x 12 x sqrt(step), of the norm 1 that all have."""
    bound = 4 * 2**-24 * 68**0.5 * 12 * 4**0.5
    left = {0: trace(), 4: trace()}
    for factor, beyond in ((0.9, False), (1.1, True)):
        said = by_bound(left, {0: trace(), 4: trace({"head": moved(factor * bound)})}, "fp32", 0.0)
        assert said.startswith("differ by more than rounding, first at step 4 in the gradient of head: ") is beyond
        assert f"{factor * bound:.1e} of {bound:.1e}" in said


def test_small_gradients_widen_the_bound_of_their_weights_and_of_no_others() -> None:
    """AdamW makes whole steps of lr from a gradient that is a thousandth of the others."""
    small = replace(PLAIN, norm=1e-3, projections=[0.0] * 4)
    left = {0: trace(), 4: trace({"head": small})}
    for name, word in (("head", "equal within"), ("layers.0.q", "differ by more")):
        right = {0: trace(), 4: trace({"head": small}, {name: moved(1e-3)})}
        assert by_bound(left, right, "fp32", 0.1).startswith(word)


def test_what_is_not_finite_differs_from_what_is() -> None:
    bad = replace(PLAIN, norm=None)
    assert by_bound({1: trace()}, {1: trace({"head": bad})}, "fp32", 0.0).startswith(
        "differ by more than rounding, first"
    )
    assert by_bound({1: trace({"head": bad})}, {1: trace({"head": bad})}, "fp32", 0.0).startswith("equal")


def test_copies_that_differ_are_named_from_the_first_step_on() -> None:
    assert torn({0: trace()}) == ""
    apart = trace(None, {"head": replace(PLAIN, torn=[2, 3])})
    assert torn({0: trace(), 5: apart}) == "copies differ from step 5 on in the weights of head, on ranks 2, 3"


def test_a_run_folder_keeps_them_cuts_them_back_and_passes_over_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, {"stage": "sft"}, {})
    for step in (0, 1, 2):
        folder.trace(step, trace(tokens=step))
    assert read_traces(tmp_path) == {step: trace(tokens=step) for step in (0, 1, 2)}
    folder.cut_back(1)
    with (tmp_path / FILE).open("a") as stream:
        stream.write(json.dumps({"step": 7, "layout": "x"}) + '\n{"step": 8, "lay')
    assert sorted(read_traces(tmp_path)) == [0, 1]
    RunFolder.open(tmp_path, {"stage": "sft"}, {})
    with pytest.raises(FrameworkError, match="attempt 1 is over"):
        folder.trace(2, trace())
