"""`ops`: what is not here is refused as it is typed, before anything starts; what is here reaches every process that
computes, and none after it."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from cuda_ext import dispatch, library
from framework.core.errors import UsageError
from framework.core.records import PromptBatch
from framework.engine.config import AttentionFrom, OpFrom, TrainingOpsConfig
from framework.main import compose, main
from framework.stages import plan, roles
from framework.stages.config import PretrainRun, RunConfig
from framework.stages.job import open_job
from framework.stages.ops import check_ops, settle_worker
from tests.cuda_ext.standing_in import H100, standing_in
from tests.models.drawn import drawn, tokens

SFT = ["sft", "init_from=base", "data.train=[a.jsonl]", "device=cpu"]
PPO = ["ppo", "init_from=base", "reward_from=rm", "data.train=[a.jsonl]", "device=cpu"]
EVALUATE = ["evaluate", "init_from=base", "evaluation.tasks=[verse_form]", "device=cpu"]
BF16 = "engine.precision=bf16"
ABSENT = "NVIDIA apex is not installed here (the package `apex` on PyPI is another program)"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([*SFT, "ops.norm=apex"], f"framework sft: ops.norm=apex: {ABSENT}; leave it out, or choose torch"),
        ([*PPO, "ops.norm=apex", "rollout.strict=false"], f"framework ppo: ops.norm=apex: {ABSENT}; leave it out, or "
         "choose torch"),
        ([*EVALUATE, "ops.norm=apex"], f"framework evaluate: ops.norm=apex: {ABSENT}; leave it out, or choose torch"),
        ([*SFT, "ops.optimizer=apex"], f"framework sft: ops.optimizer=apex: {ABSENT}; leave it out, or choose torch"),
        ([*SFT, "ops.attention=flash", BF16], "framework sft: ops.attention=flash: flash-attn is not installed here; "
         "it runs on GPUs, and this is a CPU; leave it out, or choose torch or reference"),
        ([*SFT, "ops.attention=flash"], "framework sft: ops.attention=flash takes bf16, not engine.precision=fp32; "
         "choose engine.precision=bf16, or ops.attention=torch"),
        ([*PPO, "ops.attention=torch"], "framework ppo: ops.attention=torch does not go with strict mode (engine."
         "strict, rollout.strict), which has the reference's; leave it out"),
        ([*SFT, "ops.norm=apex", "engine.strict=true"], "framework sft: ops.norm=apex does not go with strict mode "
         "(engine.strict, rollout.strict): its bits are not known to depend on the row alone; choose kernel or torch"),
        ([*SFT, "ops.attention=flash", BF16, "parallel=cp"], "framework sft: ops.attention=flash does not go with "
         "parallel.context=0, whose ranks attend by a core of their own; leave it out"),
        ([*SFT, "ops.norm=kernel", "engine.precision=fp64"], "framework sft: ops.norm=kernel does not go with "
         "engine.precision=fp64; choose torch"),
        ([*SFT, "ops.optimizer=apex", "parallel=zero3_offload"], "framework sft: ops.optimizer=apex runs on GPUs, "
         "parallel=zero3_offload updates in CPU memory; choose torch"),
        ([*EVALUATE, "ops.attention=flash"], "framework evaluate: ops.attention=flash does not go with evaluate, which "
         "reads from caches; leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_run_here_is_refused_by_name(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(words, capsys) == line


def test_a_word_that_is_none_is_answered_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([*SFT, "ops.attention=flash_attention_2"], capsys)
    assert "ops.attention" in line
    assert all(str(choice) in line for choice in AttentionFrom)
    assert "ops.attention" in refused([*SFT, "attn_implementation=flash_attention_2"], capsys)


def test_on_a_card_it_says_what_else_would_work_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "why_not", lambda device: "")
    with standing_in(card=H100):
        assert refused([*SFT, "ops.norm=apex"], capsys) == (
            f"framework sft: ops.norm=apex: {ABSENT}; leave it out, or choose kernel or torch"
        )
    with standing_in("other_apex", card=H100):
        assert "is not NVIDIA's but the package of that name on PyPI" in refused([*SFT, "ops.norm=apex"], capsys)
    with standing_in("flash_3", card=(8, 0)):
        assert refused([*SFT, "ops.attention=flash", BF16], capsys) == (
            "framework sft: ops.attention=flash: flash-attn 3 is for compute capability 9.0, this card has 8.0; leave "
            "it out, or choose torch or reference"
        )
    with standing_in("flash_3", "apex", card=H100):
        words = ["ops.attention=flash", "ops.norm=apex", "ops.optimizer=apex", BF16]
        check_ops(compose("sft", [*SFT[1:], *words])[0])


def test_the_environment_goes_before_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with standing_in("apex", card=H100), dispatch.use("reference"):
        line = refused([*SFT, "ops.norm=apex"], capsys)
    assert line == "framework sft: ops.norm=apex: CUDA_EXT=reference leaves no choice; leave it out, or choose torch"


def test_a_kernel_that_is_not_built_is_refused_and_an_emulated_one_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "no kernel is built: python -m cuda_ext build makes the library where nvcc is"
    monkeypatch.setattr(library, "why_not", lambda device: reason)
    line = refused([*SFT, "ops.norm=kernel"], capsys)
    assert line == f"framework sft: ops.norm=kernel: {reason}; leave it out, or choose torch"
    with dispatch.use("emulator"):
        check_ops(compose("sft", [*SFT[1:], "ops.norm=kernel", "ops.optimizer=kernel"])[0])


def test_a_pipeline_is_refused_before_its_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ABSENT in refused(["pipeline", "experiment=quickstart", "device=cpu", "sft.ops.norm=apex"], capsys)
    assert not list(tmp_path.iterdir())


def test_explain_says_what_it_would_refuse_and_what_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *SFT, "ops.norm=apex", "ops.attention=reference"]) == 0
    assert f"# ops.norm=apex: {ABSENT}; leave it out, or choose torch" in capsys.readouterr().out
    assert main(["explain", *SFT, "ops.attention=reference"]) == 0
    assert "# ops.attention=reference: can run here" in capsys.readouterr().out
    assert main(["explain", *SFT]) == 0
    assert "# ops" not in capsys.readouterr().out


def test_choices_of_recipes_and_of_operators_are_the_same() -> None:
    kinds = {"attention": AttentionFrom, "norm": OpFrom, "optimizer": OpFrom}
    assert [entry.name for entry in fields(TrainingOpsConfig)] == list(kinds)
    assert {kind: tuple(map(str, choices)) for kind, choices in kinds.items()} == dispatch.CHOICES
    with pytest.raises(ValueError, match=r"ops\.norm=fused is unknown: choose one of auto, kernel, torch, apex"):
        dispatch.prefer(norm="fused")


def config_of(folder: Path, *words: str) -> RunConfig:
    return compose("evaluate", [*EVALUATE[1:], f"run.root={folder}", "threads=1", *words])[0]


def test_a_job_prefers_what_its_recipe_says_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """In no part of what the run is: another choice continues it; saved all the same."""
    for choice in ("torch", "auto"):
        with open_job(config_of(tmp_path, f"ops.norm={choice}")) as job:
            assert dispatch.preferred("norm") == choice
            assert not job.finished
        assert dispatch.preferred("norm") == "auto"
        saved = yaml.safe_load((tmp_path / "evaluate/config.yaml").read_text())
        assert saved["ops"] == {"attention": "auto", "norm": choice}
    with pytest.raises(UsageError, match="evaluation"), open_job(config_of(tmp_path, "evaluation.limit=3")):
        pass


def test_a_rank_prefers_what_was_typed_for_all(tmp_path: Path) -> None:
    """A rank is sent its recipe, and opens its job like a process alone."""
    words = ["ops.norm=torch", "ops.optimizer=torch", "ops.attention=reference", f"run.root={tmp_path}"]
    with open_job(pickle.loads(pickle.dumps(compose("sft", [*SFT[1:], *words])[0]))):
        said = {kind: dispatch.preferred(kind) for kind in dispatch.CHOICES}
    assert said == {"attention": "reference", "norm": "torch", "optimizer": "torch"}


def test_every_worker_of_ppo_is_settled_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PPO hands its cluster to run first in each worker, sent as Ray sends it."""

    class Enough(Exception):
        pass

    @contextmanager
    def cluster(*_: Any, prepare: Any, **__: Any) -> Iterator[None]:
        monkeypatch.setattr(dispatch, "_wanted", {})
        pickle.loads(pickle.dumps(prepare))()
        raise Enough
        yield

    for name, stub in (("open_cluster", cluster), ("read_folder", lambda folder: (None,)), ("check", lambda *_: None)):
        monkeypatch.setattr(roles, name, stub)
    monkeypatch.setattr(roles, "_refuse_unfit", lambda *_: None)
    (config,) = compose("ppo", [*PPO[1:], "ops.norm=torch"])
    batch = PromptBatch(*(torch.zeros(1, 1) for _ in fields(PromptBatch)))
    canary = type("Rows", (), {"rows": lambda self, numbers: batch, "__len__": lambda self: 1})()
    job = SimpleNamespace(folder=SimpleNamespace(path=tmp_path), facts={"extensions": {}})
    with pytest.raises(Enough), roles.open_roles(job, config, None, canary):  # type: ignore[arg-type]
        pass
    assert dispatch.preferred("norm") == "torch"


def test_a_worker_refuses_what_its_machine_has_not() -> None:
    with pytest.raises(UsageError, match=r"ops\.norm=apex: NVIDIA apex is not installed here"):
        settle_worker([], {}, {"norm": "apex"}, "cpu")


def test_torchs_own_are_the_same_bits_on_a_cpu_and_the_explicit_attention_the_same_numbers() -> None:
    model = drawn()
    before = model(tokens(2, 9))
    with dispatch.preferring(attention="torch", norm="torch", optimizer="torch"):
        assert torch.equal(model(tokens(2, 9)), before)
    with dispatch.preferring(attention="reference"):
        torch.testing.assert_close(model(tokens(2, 9)), before)


@pytest.mark.parametrize(
    ("words", "kernel", "norms"),
    [
        ([], True, True),
        (["ops.norm=torch"], True, False),
        (["engine.strict=true"], False, False),
        (["device=cpu"], False, False),
    ],
)
def test_memory_is_planned_with_the_kernels_that_would_run(
    monkeypatch: pytest.MonkeyPatch, words: list[str], kernel: bool, norms: bool
) -> None:
    monkeypatch.setattr("cuda_ext.library.why_not", lambda device: "")
    (config,) = compose("pretrain", ["tokenizer=somewhere", "data.train=[a.txt]", *words])
    assert isinstance(config, PretrainRun)
    numbers = plan._numbers(config)
    assert (numbers.kernel, numbers.fused_norms) == (kernel, norms)
    with dispatch.use("reference"):
        assert not plan._numbers(config).kernel


def test_strict_generation_takes_no_norms_of_apex(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused([*EVALUATE, "generation.strict=true", "ops.norm=apex"], capsys)
    assert "ops.norm=apex does not go with strict mode (generation.strict)" in said
