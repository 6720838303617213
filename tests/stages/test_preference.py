"""The stage `preference`: its loss beside trl's trainer on the models before and after, the reference asked once and
never again, killed and continued to the same bits, one answer under every kind of layout."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from trl import DPOConfig as TheirConfig
from trl import DPOTrainer

import framework.stages.preference  # noqa: F401, so that a forked process need not
from framework.core.config import recipes_folder
from framework.core.records import Counts, PreferenceBatch, Scores, TokenBatch, whole
from framework.core.runtime import Runtime
from framework.main import main
from framework.models.config import ModelConfig
from framework.models.hub import save_weights
from framework.models.init import parameter_shapes, random_weights
from framework.stages.config import DpoConfig, DpoKind
from framework.stages.preference import preference_loss
from framework.stages.reference import FILE
from tests.distributed import run_ranks
from tests.objectives.laws import TRL_ON_CPU
from tests.test_faults import measured
from tests.test_stopping import ASK
from tests.tiny import end, fork, forked, model_folders

PAIRS = recipes_folder() / "corpora" / "tang" / "preference.train.jsonl"
QUIET = ["device=cpu", "threads=1", "tracking.progress=false", "tracking.every=1", "optim.warmup=0"]
SIZES = ["data.max_tokens=32", "batch.size=4", "batch.micro_size=2", "train.steps=6", "optim.lr=1e-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/, a model of two layers with weights spread wide, and pairs to train (40) and to validate (7) on."""
    folder = tmp_path_factory.mktemp("preference")
    model_folders(folder)
    vocab_size = json.loads((folder / "policy/config.json").read_text())["vocab_size"]
    model = ModelConfig(vocab_size=vocab_size, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
    read, shapes = random_weights(model, 1), parameter_shapes(model)
    scale = {name: 8.0 if name.startswith("embedding") else 1.0 for name in shapes}
    weights = [(name, scale[name] * read(name, whole(shape))) for name, shape in shapes.items()]
    save_weights(model, weights, folder / "policy")
    lines = PAIRS.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    (folder / "valid.jsonl").write_text("".join(lines[40:47]), encoding="utf-8")
    return folder


def words(folder: Path, run: Path, *more: str) -> list[str]:
    data = [f"data.{part}=[{folder / part}.jsonl]" for part in ("train", "valid")]
    places = [f"init_from={folder / 'policy'}", *data, f"run.dir={run}", f"data.cache={folder / 'prepared'}"]
    return ["preference", *places, *QUIET, *SIZES, f"extensions=[{ASK}]", *more]


def done(folder: Path, run: Path, *more: str) -> dict[str, float]:
    """The figures of a run in a process of its own."""
    code, said = end(fork(words(folder, run, *more), run.with_suffix(".log")), run.with_suffix(".log"))
    assert code == 0, said
    return figures(run)


def figures(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "summary.json").read_text())["figures"]
    return found


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done(folder, run, "checkpoint.every=2")
    return run


def content(run: Path) -> list[Any]:
    return [(run / "model/model.safetensors").read_bytes(), (run / FILE).read_bytes(), measured(run / "metrics.jsonl")]


def records(path: Path) -> dict[str, list[Any]]:
    """Conversations as trl takes them."""
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [[{"role": role, "content": pair[key]}] for pair in pairs] for key, role in roles.items()}


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_loss_is_trls_on_the_models_before_and_after(
    folder: Path, tmp_path: Path, undisturbed: Path, kind: str
) -> None:
    run = tmp_path / "run" if kind == "ipo" else undisturbed
    ours = done(folder, run, "dpo.kind=ipo") if kind == "ipo" else figures(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder / "policy", run / "model")
    )
    config = TheirConfig(output_dir=str(tmp_path), per_device_train_batch_size=7, loss_type=[kind], **TRL_ON_CPU)
    rows = Dataset.from_dict(records(folder / "valid.jsonl"))
    trainer = DPOTrainer(after, ref_model=before, args=config, train_dataset=rows, processing_class=tokenizer)
    after.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(after, dict(next(iter(trainer.get_train_dataloader()))))
    assert ours["valid/loss"] == pytest.approx(float(loss), rel=1e-4)
    assert abs(ours["valid/loss"] - ours["valid/loss/before"]) > 1e-2  # it went somewhere
    if kind == "sigmoid":  # trl reports rewards of sums for ipo too, whose loss it takes of averages
        reported = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
        assert ours["valid/accuracy"] == pytest.approx(reported["rewards/accuracies"])
        assert ours["valid/reward_margin"] == pytest.approx(reported["rewards/margins"], rel=1e-3)


def batch(reference: torch.Tensor) -> PreferenceBatch:
    """Two pairs, rows of four; answers of 2 and 1 tokens, and of 3 and 2."""
    zeros = torch.zeros(2, 4, dtype=torch.long)
    masks = torch.tensor([[[0, 1, 1, 0], [1, 1, 1, 0]], [[0, 1, 0, 0], [0, 1, 1, 0]]]).bool()
    chosen, rejected = (TokenBatch(zeros, zeros, mask, zeros, zeros + 1) for mask in masks)
    return PreferenceBatch(chosen, rejected, None, reference)


def by_hand(dpo: DpoConfig) -> tuple[float, dict[str, float]]:
    """Log-probs of the answers: chosen -3 (2 tokens) and -6 (3), rejected -5 (1) and -4 (2)."""
    x = torch.tensor([[0, -1.0, -2, 0], [-1, -2, -3, 0], [0, -5, 0, 0], [0, -1, -3, 0]])
    reference = torch.tensor([[-4.0, -5], [-6, -5]])
    pairs = torch.tensor([2])
    loss, metrics = preference_loss(Scores(x), batch(reference), Counts(pairs, pairs, pairs), dpo=dpo)
    return float(loss), {name: float(total / weight) for name, (total, weight) in metrics.items()}


def test_by_hand() -> None:
    """h = (-3 + 4) - (-5 + 5) = 1 and (-6 + 6) - (-4 + 5) = -1."""
    loss, metrics = by_hand(DpoConfig(beta=2.0))
    expected = -(logsigmoid(torch.tensor(2.0)) + logsigmoid(torch.tensor(-2.0))) / 2
    assert loss == metrics["loss"] == pytest.approx(float(expected))
    assert (metrics["accuracy"], metrics["ranking_accuracy"]) == (0.5, 0.5)
    assert "sft_loss" not in metrics


def test_averages_by_hand() -> None:
    """h = (-3 + 4)/2 = 0.5 and 0 - (-4 + 5)/2 = -0.5; 1/(2 beta) is 1."""
    assert by_hand(DpoConfig(beta=0.5, kind=DpoKind.IPO))[0] == pytest.approx((0.5**2 + 1.5**2) / 2)
    assert by_hand(DpoConfig(beta=0.5, kind=DpoKind.IPO, average=False))[0] == pytest.approx((0**2 + 2**2) / 2)
    assert by_hand(DpoConfig(beta=1.0, kind=DpoKind.HINGE, average=True))[0] == pytest.approx((0.5 + 1.5) / 2)


def test_the_chosen_answers_own_loss_is_added() -> None:
    """3 nats over 2 tokens and 6 over 3."""
    without, _ = by_hand(DpoConfig())
    assert by_hand(DpoConfig(sft_coefficient=0.0))[0] == without
    loss, metrics = by_hand(DpoConfig(sft_coefficient=0.5))
    assert metrics["sft_loss"] == pytest.approx((1.5 + 2) / 2)
    assert loss == metrics["loss"] == pytest.approx(without + 0.5 * 1.75)


# --- the reference -------------------------------------------------------------------------------------------------


def test_the_first_step_starts_at_the_reference_which_is_the_starting_model(folder: Path, undisturbed: Path) -> None:
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["valid/reward_margin"] == lines[1]["train/reward_margin"] == 0.0
    assert lines[0]["valid/loss"] == lines[1]["train/loss"] == pytest.approx(0.6931471806, rel=1e-7)
    assert lines[2]["train/loss"] != lines[1]["train/loss"]
    tables = load_file(undisturbed / FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    pairs = records(folder / "valid.jsonl")
    for r, prompt in enumerate(pairs["prompt"]):
        for side, name in enumerate(("chosen", "rejected")):
            asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([tokenizer.apply_chat_template(prompt + pairs[name][r], return_dict=False)])
            with torch.no_grad():
                each = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            assert float(tables["valid"][r, side]) == pytest.approx(float(each[len(asked) - 1 :].sum()), rel=1e-4)
    assert tables["train"].shape == (40, 2)
    assert int(torch.isfinite(tables["train"]).all(1).sum()) == 6 * 4  # of the pairs that it came to see


@pytest.mark.parametrize(
    ("name", "code", "where", "nth", "lost"),
    [
        ("SIGTERM", 143, "infer", 3, False),
        ("SIGKILL", -9, "infer", 3, False),
        ("SIGKILL", -9, "forward_backward", 5, False),
        ("SIGKILL", -9, "forward_backward", 5, True),
    ],
    ids=["asked while asking", "killed while asking", "in training", "the file lost too"],
)
def test_stopped_and_continued_it_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, undisturbed: Path, name: str, code: int, where: str, nth: int, lost: bool
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    argv = words(folder, run, "checkpoint.every=2")
    assert end(fork(argv, log, f"{name} framework.engine.torch_engine:TorchEngine.{where} {nth}"), log)[0] == code
    assert (run / FILE).exists() == (nth == 5)
    assert bool(list(run.glob("checkpoints/step_*"))) == (nth == 5)
    if lost:
        (run / FILE).unlink()
    assert end(fork(argv, log), log)[0] == 0
    assert content(run) == content(undisturbed)


def test_a_longer_run_asks_about_the_pairs_that_are_new_to_it(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done(folder, run, "train.steps=2")
    first = load_file(run / FILE)["train"]
    done(folder, run, "train.steps=15")
    second = load_file(run / FILE)["train"]
    known = torch.isfinite(first).all(1)
    assert int(known.sum()) == 8
    assert torch.isfinite(second).all()
    assert torch.equal(second[known], first[known])


def test_other_data_are_asked_about_anew(folder: Path, tmp_path: Path) -> None:
    """A table of as many rows, made for others, is not believed."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(folder, data)
    log = tmp_path / "log"
    argv = words(data, run)
    assert end(fork(argv, log, "SIGKILL framework.engine.torch_engine:TorchEngine.forward_backward 1"), log)[0] == -9
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    assert end(fork(argv, log), log)[0] == 0
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first["train/reward_margin"] == 0.0


def test_a_reference_without_finite_log_probs_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    file = tmp_path / "data/policy/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    log = tmp_path / "log"
    code, said = end(fork(words(tmp_path / "data", tmp_path / "run"), log), log)
    assert code == 1
    assert "a log-probability that is not finite" in said.splitlines()[-1]
    assert "Traceback" not in said


# --- what learns, and where ----------------------------------------------------------------------------------------


def test_frozen_parts_keep_their_bits(folder: Path, tmp_path: Path) -> None:
    done(folder, tmp_path / "run", "train.freeze=[embedding]", "dpo.sft_coefficient=1")
    before, after = (load_file(path / "model.safetensors") for path in (folder / "policy", tmp_path / "run/model"))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {"model.embed_tokens.weight"}


def as_rank(runtime: Runtime, argv: Sequence[str]) -> int:
    os.environ |= {name: str(n) for name, n in (("RANK", runtime.rank), ("WORLD_SIZE", runtime.world_size))}
    return main(list(argv))


NIGHTLY = [pytest.param(layout, marks=pytest.mark.nightly) for layout in ("fsdp", "tp", "cp")]


@pytest.mark.parametrize("layout", ["ddp", "pp", *NIGHTLY])
def test_two_ranks_end_where_one_does(folder: Path, tmp_path: Path, undisturbed: Path, layout: str) -> None:
    """Seven pairs to validate on do not divide by two ranks."""
    argv = words(folder, tmp_path / "run", f"parallel={layout}", "batch.micro_size=1", "train.validate_every=3")
    assert run_ranks(as_rank, 2, argv, timeout_s=240, deadline_s=120) == [0, 0]
    theirs, ours = figures(undisturbed), figures(tmp_path / "run")
    names = [name for name in theirs if name.startswith("valid/") or name == "train/grad_norm"]
    assert len(names) > 8
    assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3, abs=1e-5)
    for name, table in load_file(undisturbed / FILE).items():
        torch.testing.assert_close(load_file(tmp_path / "run" / FILE)[name], table, rtol=1e-5, atol=1e-5)


def test_the_command_trains_an_adapter_runs_tasks_and_says_what_was_learned(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tasks = ["evaluation.tasks=[assigned_rhyme]", "evaluation.limit=2", "sampling.max_tokens=8"]
    said = forked(*words(folder, run, "lora.rank=2", *tasks), cwd=tmp_path).stdout
    assert "is preferred to" in said
    assert "parameters learn (" in said
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first["train/reward_margin"] == 0.0
    assert (run / "adapter/adapter_config.json").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["figures"]["valid/loss"] != summary["figures"]["valid/loss/before"]
    assert "assigned_rhyme" in summary["figures"]
    assert [row["what"].partition(" (")[0] for row in summary["learned"]][-1] == "assigned rhyme"
    assert 0 <= summary["learned"][0]["before"] <= 1
