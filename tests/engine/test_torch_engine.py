"""The engine on one process: against a bare PyTorch loop, under any split, on bad numbers, on policy bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from framework.core.errors import NonFiniteError
from framework.core.records import Counts, Metrics, PreferenceBatch, Rollout, Rows, Scores, count
from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig, NonFinite, Precision
from framework.engine.metrics import means
from framework.engine.protocol import Engine, LossFn
from framework.models.config import ModelConfig
from framework.models.init import fill, random_weights
from framework.models.transformer import Transformer
from framework.objectives.language import next_token_loss
from framework.optim.build import is_decayed
from framework.optim.schedule import learning_rate
from framework.parallel.config import ParallelConfig
from tests.distributed import run_ranks
from tests.engine.cases import (
    DDP,
    FSDP,
    OPTIM,
    TIED,
    UNTIED,
    VOCAB,
    build,
    deviation,
    gradients,
    language_loss,
    packed,
    padded,
    pairs,
    ranking_loss,
    rollout,
    value_loss,
    weights,
)

FP64 = EngineConfig(precision=Precision.FP64)


def run(engine: Engine, rows: Rows, loss_fn: LossFn = language_loss, steps: int = 1) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(means(engine.forward_backward(rows, loss_fn))["loss"])
        engine.step()
    return losses


@pytest.mark.parametrize("model", [TIED, UNTIED], ids=["tied", "untied"])
def test_equal_to_a_bare_pytorch_loop(model: ModelConfig) -> None:
    """Five steps of the same model under torch's AdamW, clip_grad_norm_ and cross entropy, in fp64."""
    body = Transformer(model)
    bare = fill(body, random_weights(model, seed=7), dtype=torch.float64)
    groups = [
        {"params": [p for n, p in bare.named_parameters() if is_decayed(n, p.shape) is kind], "weight_decay": decay}
        for kind, decay in ((True, OPTIM.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    engine = build(config=FP64, model=model, micro_size=3)
    clipped = 0
    for step in range(5):
        rows = packed(4, seed=step)
        metrics = engine.forward_backward(rows, language_loss)
        report = engine.step()
        hidden = bare(rows.tokens, positions=rows.positions, document_ids=rows.document_ids)
        loss = torch.nn.functional.cross_entropy(bare.logits(hidden)[rows.loss_mask], rows.labels[rows.loss_mask])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(bare.parameters(), OPTIM.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, 20)
        optimizer.step()
        clipped += bool(norm > OPTIM.clip)
        assert means(metrics)["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-10)
    assert clipped, "clipping was never tried"
    assert deviation(weights(engine), dict(bare.named_parameters())) < 1e-10
    assert engine.step_count == 5


@settings(max_examples=15, deadline=None)
@given(micro=st.integers(1, 8), order=st.permutations(range(6)))
def test_any_split_in_any_order_gives_the_same_gradient(micro: int, order: list[int]) -> None:
    """Law Tokens, rows with very different numbers of labels."""
    rows = packed(6, trained=0.3)
    whole, split = build(config=FP64, micro_size=6), build(config=FP64, micro_size=micro)
    one = whole.forward_backward(rows, language_loss)
    other = split.forward_backward(rows.select(torch.tensor(order)), language_loss)
    assert means(other)["loss"] == pytest.approx(means(one)["loss"], rel=1e-12)
    assert deviation(gradients(split), gradients(whole)) < 1e-12


def test_several_passes_add_up_when_counts_are_given() -> None:
    rows = packed(4)
    whole, parts = build(config=FP64), build(config=FP64)
    whole.forward_backward(rows, language_loss)
    for part in rows.split(2):
        parts.forward_backward(part, language_loss, count(rows))
    assert deviation(gradients(parts), gradients(whole)) < 1e-12


def test_rows_without_a_document_change_nothing_and_reach_no_loss() -> None:
    """A loss over pairs has no mask: an empty pair would cost log 2."""
    seen = []

    def watching(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        seen.append((len(rows), int(counts.pairs)))
        return ranking_loss(scores, rows, counts)

    rows = pairs(3)
    with_empty = type(rows).concat([rows.select(slice(0, 1)), _empty(rows), rows.select(slice(1, 3))])
    plain, holed = (build(config=FP64, num_classes=1) for _ in range(2))
    expected = plain.forward_backward(rows, ranking_loss)
    got = holed.forward_backward(with_empty, watching)
    assert seen == [(2, 3), (1, 3)]
    assert means(got) == pytest.approx(means(expected), rel=1e-12)
    assert deviation(gradients(holed), gradients(plain)) < 1e-12
    assert means(holed.measure(with_empty, ranking_loss)) == pytest.approx(means(expected), rel=1e-12)


def _empty(rows: PreferenceBatch) -> PreferenceBatch:
    return rows.select(slice(0, 1))._map(torch.zeros_like)


def test_a_rank_without_rows_leaves_gradients_of_zero() -> None:
    engine = build()
    metrics = engine.forward_backward(packed(2).select(slice(0, 0)), language_loss)
    assert means(metrics) == {}
    assert all(not gradient.any() for gradient in gradients(engine).values())


@pytest.mark.parametrize("heads", [{}, {"value_head": True}, {"num_classes": 2}], ids=["words", "value", "classes"])
def test_inference_does_not_depend_on_the_cut(heads: dict[str, Any]) -> None:
    rows = pairs(5)
    whole, cut = build(config=FP64, micro_size=5, **heads).infer(rows), build(config=FP64, **heads).infer(rows)
    for name in ("log_probs", "values", "classes"):
        a, b = getattr(whole, name), getattr(cut, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert whole.log_probs.shape == (10, 16)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_ratio_is_one_bit_for_bit(strict: bool, threads: int) -> None:
    """Law On-policy: rows shuffled, in other places of other micro-batches, the last one filled up; fp32."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = build(config=EngineConfig(strict=strict), micro_size=4)
        rows = rollout(10)
        old = engine.infer(rows).log_probs
        ratios = []

        def watching(scores: Scores, part: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
            assert isinstance(part, Rollout)
            mask = part.inputs().loss_mask
            ratios.append(torch.exp(scores.log_probs.detach() - old[part.row])[mask])
            return language_loss(scores, part, counts)

        order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
        engine.forward_backward(rows.select(order), watching)
        assert len(torch.cat(ratios)) == int(rows.response_mask.sum())
        assert bool((torch.cat(ratios) == 1.0).all())
    finally:
        torch.set_num_threads(before)


def test_every_forward_has_one_shape() -> None:
    engine = build(micro_size=2)
    shapes = []
    engine.scorers[0].model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    engine.forward_backward(packed(5), language_loss)
    engine.measure(packed(1), language_loss)
    engine.infer(packed(3))
    assert shapes == [(2, 16)] * 6


def test_a_pointwise_loss_runs_inside_the_scorer_with_equal_results() -> None:
    def pointwise(log_probs: Tensor, entropy: Tensor | None, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        assert entropy is not None
        loss, metrics = next_token_loss(log_probs, rows.inputs().loss_mask, counts.tokens)
        return loss, metrics | {"entropy": (entropy.sum().detach(), rows.inputs().loss_mask.sum())}

    pointwise.pointwise = pointwise.needs_entropy = True  # type: ignore[attr-defined]
    ours, plain = build(config=FP64), build(config=FP64)
    metrics = ours.forward_backward(packed(5), pointwise)  # type: ignore[arg-type]
    expected = plain.forward_backward(packed(5), language_loss)
    assert means(metrics)["loss"] == pytest.approx(means(expected)["loss"], rel=1e-12)
    assert 0 < means(metrics)["entropy"] <= torch.tensor(float(VOCAB)).log() + 1e-6
    assert deviation(gradients(ours), gradients(plain)) < 1e-12


def poisoned(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
    loss, metrics = language_loss(scores, rows, counts)
    return loss * float("nan"), metrics


def infinite(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
    """The loss is infinite, its gradient is not."""
    loss, metrics = language_loss(scores, rows, counts)
    return loss + float("inf"), metrics


@pytest.mark.parametrize("bad", [poisoned, infinite])
def test_a_skipped_step_changes_no_bit(bad: LossFn) -> None:
    engine = build(config=EngineConfig(non_finite=NonFinite.SKIP))
    run(engine, packed(2))
    before = {name: tensor.clone() for name, _, tensor in engine.shards()}
    engine.forward_backward(packed(2), bad)
    report = engine.step()
    assert report.skipped
    after = {name: tensor for name, _, tensor in engine.shards()}
    steps_before, steps_after = before.pop("optim/steps"), after.pop("optim/steps")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (steps_before.tolist(), steps_after.tolist()) == ([1, 1, 0], [2, 1, 1])
    assert not any(bool(gradient.any()) for gradient in gradients(engine).values())


def test_a_good_step_after_a_skipped_one_is_as_if_nothing_had_been_but_the_schedule() -> None:
    disturbed, plain = build(config=EngineConfig(non_finite=NonFinite.SKIP)), build()
    disturbed.forward_backward(packed(2), poisoned)
    disturbed.step()
    plain.step_count = 1
    for engine in (disturbed, plain):
        run(engine, packed(2), steps=2)
    assert all(torch.equal(weight, weights(plain)[name]) for name, weight in weights(disturbed).items())


def test_skips_in_a_row_are_bounded_and_a_good_step_starts_the_count_again() -> None:
    engine = build(config=EngineConfig(non_finite=NonFinite.SKIP, max_skips=2))

    def step(loss_fn: LossFn) -> None:
        engine.forward_backward(packed(2), loss_fn)
        engine.step()

    for loss_fn in (poisoned, poisoned, language_loss, poisoned, poisoned):
        step(loss_fn)
    with pytest.raises(NonFiniteError, match=r"more than engine.max_skips=2 such steps in a row"):
        step(poisoned)


def test_the_recipe_may_stop_at_the_first_bad_number() -> None:
    engine = build()
    engine.forward_backward(packed(2), poisoned)
    with pytest.raises(NonFiniteError, match=r"step 0: loss nan, gradient norm nan; lower optim.lr.*non_finite=skip"):
        engine.step()


def test_gradients_are_clipped_to_the_global_norm() -> None:
    """With clip c below the norm, Adam's first moment is (1 - beta1) c / norm times the gradient."""
    engine = build(config=FP64, optim=replace(OPTIM, clip=0.125))
    engine.forward_backward(packed(2), language_loss)
    raw = gradients(engine)
    norm = torch.cat([g.flatten() for g in raw.values()]).norm()
    report = engine.step()
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-12)
    moments = {n.removeprefix("optim/exp_avg/"): t for n, _, t in engine.shards() if n.startswith("optim/exp_avg/")}
    for name, gradient in raw.items():
        expected = (1 - OPTIM.beta1) * 0.125 / (norm + 1e-6) * gradient
        torch.testing.assert_close(moments[name.removeprefix("model.")], expected, rtol=1e-12, atol=1e-18)


def test_bf16_computes_in_bf16_and_keeps_everything_else_in_fp32() -> None:
    dtypes = []

    def watching(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        dtypes.append(engine.scorers[0].get_submodule("model.layers.0.mlp.up").weight.dtype)
        return language_loss(scores, rows, counts)

    engine, exact = build(config=EngineConfig(precision=Precision.BF16)), build()
    loss = means(engine.forward_backward(packed(4), watching))["loss"]
    assert set(dtypes) == {torch.bfloat16}
    assert {g.dtype for g in gradients(engine).values()} == {torch.float32}
    assert loss == pytest.approx(means(exact.forward_backward(packed(4), language_loss))["loss"], rel=1e-2)
    assert 1e-6 < deviation(gradients(engine), gradients(exact)) < 0.1
    engine.step()
    assert {t.dtype for name, _, t in engine.shards() if name != "optim/steps"} == {torch.float32}


def test_states_go_out_and_come_back_to_the_same_bits() -> None:
    first, second = build(), build(optim=replace(OPTIM))
    run(first, packed(2), steps=3)
    saved = {name: tensor.clone() for name, _, tensor in first.shards()}
    second.load_shards(lambda name, box: saved[name])
    assert second.step_count == 3
    for engine in (first, second):
        run(engine, packed(2, seed=5), steps=2)
    for (name, _, a), (_, _, b) in zip(first.shards(), second.shards()):
        assert torch.equal(a, b), name


def test_loading_weights_starts_the_optimizer_afresh() -> None:
    used, fresh = build(), build()
    run(used, packed(2), steps=3)
    used.load_weights(random_weights(TIED, seed=7))
    assert run(used, packed(2), steps=2) == run(fresh, packed(2), steps=2)
    assert used.step_count == 2


def test_weights_come_whole_under_the_names_of_the_model() -> None:
    engine = build(value_head=True, model=UNTIED)
    names = {name: weight.shape for name, weight in engine.weights()}
    assert names["value_head.weight"] == (1, 20)
    assert names["layers.0.attention.q.weight"] == (20, 20)
    assert "head.weight" not in names


def _digest_of(runtime: Runtime, layout: ParallelConfig) -> str:
    return build(runtime, layout, value_head=True, model=UNTIED).digest()


@pytest.mark.parametrize("layout", [FSDP, DDP], ids=lambda layout: layout.name)
def test_a_digest_does_not_know_how_the_weights_lie(layout: ParallelConfig) -> None:
    alone = build(value_head=True, model=UNTIED).digest()
    assert len(alone) == 16
    assert run_ranks(_digest_of, 2, layout) == [alone, alone]


def test_a_digest_sees_one_bit_and_which_tensor_it_is_in() -> None:
    engine, other = build(model=UNTIED), build(model=UNTIED)
    assert engine.digest() == other.digest()
    weight = other.holdings.parameters["layers.0.attention.q.weight"].data
    weight.view(torch.int32)[3, 5] ^= 1
    assert engine.digest() != other.digest()
    swapped = build(model=UNTIED)
    q, o = (swapped.holdings.parameters[f"layers.0.attention.{n}.weight"].data for n in ("q", "o"))
    q_before = q.clone()
    q.copy_(o)
    o.copy_(q_before)
    assert swapped.digest() != engine.digest()


def test_values_and_classes_learn() -> None:
    critic, judge = build(value_head=True, micro_size=4), build(num_classes=1, micro_size=4)
    first, *_, last = run(critic, rollout(4), value_loss, steps=8)
    assert last < 0.5 * first
    first, *_, last = run(judge, pairs(4), ranking_loss, steps=8)
    assert last < first


@pytest.mark.nightly  # over a minute of compiling on a CPU
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_compiled_blocks_compute_the_same(precision: Precision) -> None:
    compiled = build(config=EngineConfig(precision=precision, compile=True))
    eager = build(config=EngineConfig(precision=precision))
    tolerance = 1e-4 if precision is Precision.FP32 else 1e-1
    for step in range(2):
        losses = [means(e.forward_backward(packed(3, step), language_loss))["loss"] for e in (compiled, eager)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        assert deviation(gradients(compiled), gradients(eager)) < tolerance
        compiled.step()
        eager.step()
    assert set(weights(compiled)) == set(weights(eager))


def test_an_engine_without_optimizer_only_infers() -> None:
    engine = build(optim=None)
    assert engine.infer(padded(3)).log_probs.shape == (3, 16)
    assert [name for name, _, _ in engine.shards() if name.startswith("optim")] == []
    assert not any(parameter.requires_grad for parameter in engine.scorers[0].parameters())


def test_temperature_divides_the_logits() -> None:
    rows = padded(3)
    cold, plain = build(config=FP64, temperature=0.5), build(config=FP64)
    inputs, model = rows.inputs(), plain.scorers[0].model
    hidden = model(inputs.tokens, positions=inputs.positions)
    expected = (model.logits(hidden) / 0.5).log_softmax(-1).gather(2, inputs.labels.unsqueeze(2)).squeeze(2)
    mask = inputs.loss_mask
    torch.testing.assert_close(cold.infer(rows).log_probs[mask], expected[mask].detach(), rtol=1e-10, atol=1e-12)


def test_a_checkpoint_part_is_exactly_the_protocol() -> None:
    """mypy checks the signatures; this keeps the assignment in sight."""
    engine: Engine = build()
    assert (engine.data_rank, engine.data_size, engine.step_count) == (0, 1, 0)
