"""sft beside plain text: without it the bits of plain sft, with it the sum of two losses' gradients, and one answer
whether killed and continued or laid out over ranks."""

import json
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import framework.stages.sft  # noqa: F401, so that a forked process need not
from framework.core.records import TokenBatch, whole
from framework.core.runtime import Runtime
from framework.engine.config import EngineConfig, Precision
from framework.main import main
from framework.models.config import ModelConfig
from framework.models.hub import save_weights
from framework.models.init import fill, parameter_shapes, random_weights
from framework.models.transformer import Transformer
from framework.stages.pretrain import token_loss
from framework.stages.sft import text_loss
from framework.tasks.task import corpus_folder
from tests.distributed import run_ranks
from tests.engine.cases import TIED, build, packed
from tests.test_faults import measured
from tests.test_stopping import ASK
from tests.tiny import end, fork, model_folders

QUIET = ["device=cpu", "threads=1", "tracking.progress=false", "tracking.every=1", "optim.warmup=0"]
SIZES = ["data.max_tokens=32", "batch.size=4", "batch.micro_size=2", "train.steps=6", "optim.lr=1e-2"]
MIX = ["mix.coefficient=0.5", "mix.size=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/, sft.{train,valid}.jsonl of 40 and 7 conversations, and texts.txt of 60 poems."""
    folder = tmp_path_factory.mktemp("mixed")
    model_folders(folder)
    two_layers(folder / "policy")
    for name, size in (("sft.train.jsonl", 40), ("sft.valid.jsonl", 7), ("train.txt", 60)):
        lines = (corpus_folder("tang") / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name.replace("train.txt", "texts.txt")).write_text("".join(lines[:size]), encoding="utf-8")
    return folder


def two_layers(policy: Path) -> None:
    """So that a pipeline of two stages can hold it."""
    size = json.loads((policy / "config.json").read_text())["vocab_size"]
    model = ModelConfig(vocab_size=size, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
    read = random_weights(model, 1)
    save_weights(model, [(n, read(n, whole(s))) for n, s in parameter_shapes(model).items()], policy)


def words(folder: Path, run: Path, *more: str) -> list[str]:
    paths = [f"data.{part}=[{folder}/sft.{part}.jsonl]" for part in ("train", "valid")]
    places = [f"init_from={folder / 'policy'}", *paths, f"run.dir={run}", f"data.cache={folder / 'prepared'}"]
    return ["sft", *places, *QUIET, *SIZES, f"extensions=[{ASK}]", *more]


def texts(folder: Path) -> str:
    return f"mix.train=[{folder / 'texts.txt'}]"


def done(argv: list[str], run: Path) -> str:
    """What a run in a process of its own said."""
    code, said = end(fork(argv, run.with_suffix(".log")), run.with_suffix(".log"))
    assert code == 0, said
    return said


def figures(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "summary.json").read_text())["figures"]
    return found


def content(run: Path) -> list[Any]:
    return [(run / "model/model.safetensors").read_bytes(), measured(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    said = done(words(folder, run, texts(folder), *MIX, "checkpoint.every=2"), run)
    assert "6 a step x 0.5" in said
    return run


# --- the gradient --------------------------------------------------------------------------------------------------


def gradients(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named}


def by_hand(rows: TokenBatch, model: Transformer) -> Tensor:
    """Nats a token of rows of packed documents, by torch."""
    hidden = model(rows.tokens, positions=rows.positions, document_ids=rows.document_ids)
    return cross_entropy(model.logits(hidden)[rows.loss_mask], rows.labels[rows.loss_mask])


def test_the_gradient_is_that_of_both_losses_each_over_its_own_tokens() -> None:
    """In fp64, against autograd; the two have other numbers of rows and tokens."""
    said, text = packed(5, seed=1, trained=0.3), packed(3, seed=2, trained=1.0)
    loss: Any = partial(text_loss, coefficient=0.25)
    loss.pointwise = True
    engine = build(config=EngineConfig(precision=Precision.FP64))
    metrics = engine.forward_backward(said, token_loss) | engine.forward_backward(text, loss)
    ours = gradients(engine.gradients())
    with torch.device("meta"):
        model = Transformer(TIED)
    fill(model, random_weights(TIED, seed=7), torch.float64)
    first, second = by_hand(said, model), by_hand(text, model)
    (first + 0.25 * second).backward()
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(float(first.detach()), rel=1e-12)
    assert float(metrics["mix_loss"][0] / metrics["mix_loss"][1]) == pytest.approx(float(second.detach()), rel=1e-12)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-12)


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_coefficient_of_zero_is_plain_sft_bit_for_bit(folder: Path, tmp_path: Path, undisturbed: Path) -> None:
    plain, zero = tmp_path / "plain", tmp_path / "zero"
    done(words(folder, plain), plain)
    done(words(folder, zero, texts(folder), "mix.coefficient=0"), zero)
    assert content(plain) == content(zero)
    assert content(plain)[0] != content(undisturbed)[0]


def test_both_losses_are_reported_and_the_text_is_learned(undisturbed: Path) -> None:
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()[1:]]
    mixed = [line["train/mix_loss"] for line in lines]
    assert len(mixed) == 6
    assert mixed[-1] < mixed[0] - 0.2
    assert all(line["train/loss"] != line["train/mix_loss"] for line in lines)
    assert "valid/mix_loss" not in figures(undisturbed)


def test_killed_and_continued_it_ends_in_the_same_bits(folder: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Between the two gradients of step 4."""
    run, log = tmp_path / "run", tmp_path / "log"
    argv = words(folder, run, texts(folder), *MIX, "checkpoint.every=2")
    place = "framework.engine.torch_engine:TorchEngine.forward_backward"
    assert end(fork(argv, log, f"SIGKILL {place} 8"), log)[0] == -9
    assert end(fork(argv, log), log)[0] == 0
    assert content(run) == content(undisturbed)


def as_rank(runtime: Runtime, argv: Sequence[str]) -> int:
    os.environ |= {name: str(n) for name, n in (("RANK", runtime.rank), ("WORLD_SIZE", runtime.world_size))}
    return main(list(argv))


NIGHTLY = [pytest.param(layout, marks=pytest.mark.nightly) for layout in ("ddp", "tp", "cp", "zero2", "zero3")]


@pytest.mark.parametrize("layout", ["fsdp", "pp", *NIGHTLY])
def test_two_ranks_end_where_one_does(folder: Path, tmp_path: Path, undisturbed: Path, layout: str) -> None:
    argv = words(folder, tmp_path / "run", texts(folder), *MIX, f"parallel={layout}", "batch.micro_size=1")
    assert run_ranks(as_rank, 2, argv, timeout_s=240, deadline_s=120) == [0, 0]
    theirs, ours = figures(undisturbed), figures(tmp_path / "run")
    names = [name for name in theirs if name.endswith(("loss", "grad_norm"))]
    assert len(names) >= 4
    assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3)


def test_explained_before_it_begins(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words(folder, tmp_path / "run", texts(folder), *MIX)
    argv.remove(f"extensions=[{ASK}]")  # here it would be imported for good, and ask nothing later
    assert main(["explain", *argv]) == 0
    assert "and 6 rows of text x 32 tokens, whose loss counts 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["mix.train=[nowhere.txt]"], "mix.train: nowhere.txt"),
        (["mix.train=[SFT]"], "pretraining takes plain texts"),
        (["mix.train=[TEXTS]", "mix.size=1000"], "rows, fewer than mix.size=1000"),
        (["mix.coefficient=-1"], "mix.coefficient=-1.0 must not be negative"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(folder: Path, tmp_path: Path, more: list[str], line: str) -> None:
    names = {"SFT": f"{folder}/sft.train.jsonl", "TEXTS": f"{folder}/texts.txt"}
    for name, path in names.items():
        more = [word.replace(name, path) for word in more]
    code, said = end(fork(words(folder, tmp_path / "run", *more), tmp_path / "log"), tmp_path / "log")
    assert code == 2, said
    assert line in said.splitlines()[-1]
