"""The loop: what is logged, validated and saved when; a stop that saves; a resumed run that ends in the same bits."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # imported once, before the ranks are forked
from torch import Tensor

from framework.checkpoint.config import CheckpointConfig
from framework.checkpoint.manager import CheckpointManager
from framework.core.errors import Interrupted
from framework.core.records import Counts, Metrics, Rows, Scores
from framework.core.runtime import Runtime
from framework.core.signals import StopRequest, stop_request
from framework.engine.config import EngineConfig, NonFinite
from framework.engine.loop import Outcome, evaluate, train
from framework.engine.torch_engine import TorchEngine
from framework.tracking.divergence import GRADIENTS, WEIGHTS, Trace
from tests.distributed import run_ranks
from tests.engine.cases import FSDP, SINGLE, build, language_loss, packed, weights


class Batches:
    """4 rows a step, shared out evenly; 5 rows to validate on, so that ranks get empty ones."""

    def __init__(self, runtime: Runtime, stop_at: int | None = None):
        self.rank, self.size, self.stop_at = runtime.rank, runtime.world_size, stop_at

    def batch(self, step: int) -> Rows:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return packed(4, seed=step).select(slice(self.rank * 4 // self.size, (self.rank + 1) * 4 // self.size))

    def evaluation_batches(self) -> Iterator[Rows]:
        rows = packed(5, seed=1000)
        for start in (0, 4):
            part = rows.select(slice(start, start + 4))
            mine = part.select(slice(self.rank, None, self.size))
            yield mine if len(mine) else part.select(slice(0, 1))._map(torch.zeros_like)


class Journal:
    """Keeps in a file what a run folder would, timing left out."""

    def __init__(self, path: Path):
        self.path, self.traces = path, dict[int, Trace]()

    @property
    def lines(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        kept = {name: value for name, value in figures.items() if "per_second" not in name}
        self.path.write_text("".join(json.dumps(line) + "\n" for line in [*self.lines, {"step": step, **kept}]))

    def trace(self, step: int, trace: Trace) -> None:
        self.traces[step] = trace

    def advance(self, step: int, total: int) -> None:
        assert 0 < step <= total

    def flush(self) -> None:

        pass

    def cut_back(self, step: int) -> None:
        kept = [line for line in self.lines if line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def go(
    folder: Path, runtime: Runtime | None = None, steps: int = 6, stop_at: int | None = None, **arguments: Any
) -> tuple[Outcome, TorchEngine, Journal]:
    """Train in `folder` from wherever it stands, validating every 3 steps and saving every 2."""
    here = runtime or Runtime()
    folder.mkdir(parents=True, exist_ok=True)
    engine = build(here, FSDP if here.world_size > 1 else SINGLE, arguments.pop("config", None))
    journal = Journal(folder / f"metrics-{here.rank}.jsonl")
    with stop_request() as stop:
        outcome = train(
            engine,
            Batches(here, stop_at),
            arguments.pop("loss_fn", language_loss),
            total_steps=steps,
            manager=CheckpointManager(folder / "checkpoints", CheckpointConfig(keep=2), here.rank, here.world_size),
            folder=journal,
            progress=arguments.pop("progress", lambda done, **figures: None),
            stop=stop,
            valid=Batches(here),
            every=2,
            validate_every=3,
            checkpoint_every=2,
            **arguments,
        )
    return outcome, engine, journal


def states(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, _, tensor in engine.shards()}


def test_every_figure_stands_at_its_step(tmp_path: Path) -> None:
    shown = []
    outcome, engine, journal = go(tmp_path, progress=lambda done, **figures: shown.append((done, sorted(figures))))
    assert [(line["step"], sorted(n for n in line if n != "step")) for line in journal.lines] == [
        (0, ["valid/loss"]),
        (2, ["train/grad_norm", "train/loss", "train/lr", "train/skipped"]),
        (3, ["valid/loss"]),
        (4, ["train/grad_norm", "train/loss", "train/lr", "train/skipped"]),
        (6, ["train/grad_norm", "train/loss", "train/lr", "train/skipped", "valid/loss"]),
    ]
    assert shown == [(1, []), (2, ["loss"]), (3, ["valid"]), (4, ["loss"]), (5, []), (6, ["loss", "valid"])]
    assert outcome.before == {"valid/loss": journal.lines[0]["valid/loss"]}
    assert outcome.figures["valid/loss"] == journal.lines[-1]["valid/loss"]
    assert outcome.figures["train/tokens_per_second"] > 0
    assert engine.step_count == 6


def test_validation_weighs_tokens_and_not_batches() -> None:
    engine = build()
    both = evaluate(engine, Batches(Runtime()), language_loss, StopRequest())
    whole = engine.measure(packed(5, seed=1000), language_loss)["loss"]
    assert both["loss"] == pytest.approx(float(whole[0] / whole[1]), rel=1e-6)


def test_stopped_and_resumed_is_undisturbed(tmp_path: Path) -> None:
    """Law Resume: weights, optimizer and the journal, though the stop came between two checkpoints."""
    _, plain, journal = go(tmp_path / "plain")
    with pytest.raises(Interrupted, match="after step 5 of 6; the same command continues") as caught:
        go(tmp_path / "stopped", stop_at=4)
    assert caught.value.exit_code == 143
    outcome, resumed, rest = go(tmp_path / "stopped")
    assert all(torch.equal(tensor, states(resumed)[name]) for name, tensor in states(plain).items())
    assert rest.lines == journal.lines
    assert outcome.before == {"valid/loss": journal.lines[0]["valid/loss"]}


def test_a_killed_run_forgets_what_no_checkpoint_holds(tmp_path: Path) -> None:
    _, plain, journal = go(tmp_path / "plain")

    def killed(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        calls.append(None)
        if len(calls) > 12:  # step 0 validates in 3 passes, a step takes 2, step 3 validates
            raise MemoryError("in step 4")
        return language_loss(scores, rows, counts)

    calls: list[None] = []
    with pytest.raises(MemoryError):
        go(tmp_path / "killed", loss_fn=killed)
    assert [line["step"] for line in Journal(tmp_path / "killed/metrics-0.jsonl").lines] == [0, 2, 3]
    found = CheckpointManager(tmp_path / "killed/checkpoints").latest()
    assert found is not None
    assert found.step == 2
    _, resumed, rest = go(tmp_path / "killed")
    assert all(torch.equal(tensor, states(resumed)[name]) for name, tensor in states(plain).items())
    assert rest.lines == journal.lines


def test_digests_stand_at_their_steps_and_name_the_weights(tmp_path: Path) -> None:
    _, engine, journal = go(tmp_path / "plain", digest_every=3)
    digests = {line["step"]: line["weights/digest"] for line in journal.lines if "weights/digest" in line}
    assert sorted(digests) == [0, 3, 6]
    assert len(set(digests.values())) == 3
    assert digests[6] == engine.digest()
    assert sorted(journal.traces) == [0, 3, 6]
    assert not journal.traces[0].tensors[GRADIENTS]
    weight = dict(engine.weights())["norm.weight"]
    sketch = journal.traces[6].tensors[WEIGHTS]["norm.weight"]
    assert (sketch.size, sketch.norm) == (weight.numel(), pytest.approx(float(weight.norm())))
    assert journal.traces[6].tensors[GRADIENTS].keys() == dict(engine.weights()).keys()
    with pytest.raises(Interrupted):
        go(tmp_path / "stopped", stop_at=3, digest_every=3)
    _, _, rest = go(tmp_path / "stopped", digest_every=3)
    assert rest.lines == journal.lines


def test_a_finished_run_has_nothing_to_do_and_the_same_outcome(tmp_path: Path) -> None:
    first, _, _ = go(tmp_path)
    again, engine, journal = go(tmp_path)
    assert again.before == first.before
    assert again.figures == {n: v for n, v in first.figures.items() if "per_second" not in n}
    assert engine.step_count == 6
    assert [line["step"] for line in journal.lines] == [0, 2, 3, 4, 6]


def test_a_raised_step_count_continues(tmp_path: Path) -> None:
    go(tmp_path, steps=4)
    _, engine, journal = go(tmp_path, steps=6)
    assert engine.step_count == 6
    assert [line["step"] for line in journal.lines] == [0, 2, 3, 4, 6]


def test_the_best_checkpoint_is_judged_by_its_own_step(tmp_path: Path) -> None:
    """Step 4 was not validated: it must not inherit the figure of step 3."""
    go(tmp_path)
    checkpoints = {int(p.name[5:]): json.loads((p / "manifest.json").read_text()) for p in
                   (tmp_path / "checkpoints").iterdir()}  # fmt: skip
    assert "valid/loss" not in checkpoints[4]["metrics"]
    assert "valid/loss" in checkpoints[6]["metrics"]


def test_skipped_steps_are_counted_across_a_resume(tmp_path: Path) -> None:
    def bad_at_first(scores: Scores, rows: Rows, counts: Counts) -> tuple[Tensor, Metrics]:
        loss, metrics = language_loss(scores, rows, counts)
        return loss * float("nan") if loss.requires_grad else loss, metrics

    skip = EngineConfig(non_finite=NonFinite.SKIP)
    go(tmp_path, steps=2, loss_fn=bad_at_first, config=skip)
    _, _, journal = go(tmp_path, steps=4, config=skip)
    assert [line["train/skipped"] for line in journal.lines if "train/skipped" in line] == [2, 2]


def test_a_profile_is_a_trace_of_three_steps(tmp_path: Path) -> None:
    go(tmp_path, profile=tmp_path / "profile")
    trace = json.loads((tmp_path / "profile/trace-0.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}  # numbered from 0


def test_mfu_in_both_conventions_where_the_peak_is_known(tmp_path: Path) -> None:
    outcome, _, _ = go(tmp_path, steps=2, peak_flops=1e12)
    assert 0 < outcome.figures["train/mfu_parameters"] < 1
    assert 0 < outcome.figures["train/mfu_exact"] < 1


def _stop_one_rank(runtime: Runtime, folder: Path) -> tuple[str, list[int], dict[str, Tensor], list[Any]]:
    """SIGTERM reaches rank 1 alone; both save and leave, and both go on from there."""
    with pytest.raises(Interrupted) as caught:
        go(folder, runtime, stop_at=2 if runtime.rank == 1 else None)
    _, engine, journal = go(folder, runtime)
    return str(caught.value), [caught.value.exit_code, engine.step_count], weights(engine), journal.lines


def test_all_ranks_grant_one_rank_s_wish_together(tmp_path: Path) -> None:
    _, plain, journal = go(tmp_path / "one")
    for message, numbers, after, lines in run_ranks(_stop_one_rank, 2, tmp_path / "two"):
        assert message.startswith("stopped during validation")  # of step 3, which the next attempt begins with
        assert numbers == [143, 6]
        for name, weight in weights(plain).items():
            torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-4)
        assert [line["step"] for line in lines] == [line["step"] for line in journal.lines]
        assert lines[-1]["valid/loss"] == pytest.approx(journal.lines[-1]["valid/loss"], rel=1e-4)
