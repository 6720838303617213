"""The stage `classify`: what it learns beside transformers on the folder that it writes, killed and continued to the
same bits, one answer under every kind of layout, and data that it refuses."""

import json
import math
import os
import random
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy, mse_loss

import framework.stages.classify  # noqa: F401, so that a forked process need not
from framework.core.config import recipes_folder
from framework.core.records import whole
from framework.core.runtime import Runtime
from framework.main import main
from framework.models.config import ModelConfig
from framework.models.hub import save_weights
from framework.models.init import parameter_shapes, random_weights
from tests.distributed import run_ranks
from tests.test_faults import measured
from tests.test_stopping import ASK
from tests.tiny import end, fork, model_folders

QUIET = ["device=cpu", "threads=1", "tracking.progress=false", "tracking.every=1", "optim.warmup=0"]
SHORT = ["batch.size=4", "batch.micro_size=2", "train.steps=6", "optim.lr=1e-2", "data.max_tokens=24"]
Content = list[dict[str, Any]]


def verse(part: str, count: int) -> Content:
    """First couplets of Tang poems by their form, which counting the characters of a line tells."""
    poems = (recipes_folder() / "corpora/tang" / f"{part}.txt").read_text(encoding="utf-8").splitlines()[:count]
    couplets = [poem.partition("。")[0] + "。" for poem in poems]
    return [{"text": text, "label": {5: "five", 7: "seven"}[text.index("，")]} for text in couplets]


def key_in(count: int, seed: int) -> Content:
    """Pairs of five words; which text holds "key" only the place behind the first [SEP] tells."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        texts, label = [[f"w{draw.randrange(20)}" for _ in range(5)] for _ in range(2)], draw.randrange(2)
        texts[label][draw.randrange(5)] = "key"
        found.append({"premise": " ".join(texts[0]), "hypothesis": " ".join(texts[1]), "label": label})
    return found


def lengths(count: int, seed: int) -> Content:
    """A text's number of words, in tenths."""
    draw = random.Random(seed)
    sizes = [draw.randrange(1, 10) for _ in range(count)]
    return [{"sentence": " ".join(f"w{draw.randrange(20)}" for _ in range(n)), "label": n / 10} for n in sizes]


def tiny_bert(folder: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "key", *(f"w{n}" for n in range(20))]
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names).save_pretrained(
        folder
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/ and bert/, models of two layers, and the data above to train and to validate on."""
    folder = tmp_path_factory.mktemp("classify")
    model_folders(folder)
    size = json.loads((folder / "policy/config.json").read_text())["vocab_size"]
    model = ModelConfig(vocab_size=size, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
    read = random_weights(model, 1)
    save_weights(model, [(n, read(n, whole(s))) for n, s in parameter_shapes(model).items()], folder / "policy")
    tiny_bert(folder / "bert")
    data = {
        "verse": (verse("train", 480), verse("valid", 61)),
        "pairs": (key_in(600, 1), key_in(61, 2)),
        "lengths": (lengths(480, 1), lengths(61, 2)),
    }
    for name, parts in data.items():
        for part, content in zip(("train", "valid"), parts):
            write(folder / f"{name}.{part}.jsonl", content)
    return folder


def write(path: Path, content: Content) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")


def words(folder: Path, model: str, data: str, run: Path, *more: str) -> list[str]:
    paths = [f"data.{part}=[{folder / data}.{part}.jsonl]" for part in ("train", "valid")]
    places = [f"init_from={folder / model}", *paths, f"run.dir={run}", f"data.cache={folder / 'prepared'}"]
    return ["classify", *places, *QUIET, *SHORT, f"extensions=[{ASK}]", *more]


def done(argv: list[str], run: Path) -> str:
    """What a run in a process of its own said."""
    log = run.with_suffix(".log")
    code, said = end(fork(argv, log), log)
    assert code == 0, said
    return said


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def logits(run: Path, texts: list[tuple[str, ...]], padded: bool, behind: str = "") -> torch.Tensor:
    """What transformers' classifier says, of texts by themselves or of all in one padded batch."""
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        run / "model", output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(run / "model")
    parts = [[text + behind for text in side] for side in zip(*texts)]
    with torch.no_grad():
        if padded:
            return theirs.eval()(**tokenizer(*parts, padding=True, return_tensors="pt")).logits  # type: ignore[no-any-return]
        return torch.cat([theirs.eval()(**tokenizer(*row, return_tensors="pt")).logits for row in zip(*parts)])


# --- what it learns, and what transformers says of it --------------------------------------------------------------


def test_a_decoder_learns_the_form_of_verse_and_transformers_gives_its_logits(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = done(words(folder, "policy", "verse", run, "train.steps=40", "batch.size=16", "batch.micro_size=0"), run)
    assert "2 classes: five, seven" in said
    assert "is labelled " in said
    ours, valid = summary(run)["figures"], verse("valid", 61)
    commonest = Counter(record["label"] for record in verse("train", 480)).most_common(1)[0][0]
    assert ours["baseline/majority_accuracy"] == pytest.approx(mean(r["label"] == commonest for r in valid))
    assert ours["baseline/majority_accuracy"] < 0.65
    assert ours["valid/accuracy"] > 0.85 > 0.65 > ours["valid/accuracy/before"]
    (row,) = summary(run)["learned"]
    assert row["what"].startswith("unseen texts right (the commonest class alone: 0.")
    config = json.loads((run / "model/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["id2label"], config["label2id"]) == ({"0": "five", "1": "seven"}, {"five": 0, "seven": 1})
    found = logits(run, [(record["text"],) for record in valid], padded=True, behind="<|end|>")
    labels = torch.tensor([config["label2id"][record["label"]] for record in valid])
    assert float(cross_entropy(found, labels)) == pytest.approx(ours["valid/loss"], rel=1e-4)
    alone = logits(run, [(record["text"],) for record in valid[:9]], padded=False, behind="<|end|>")
    torch.testing.assert_close(found[:9], alone, rtol=0, atol=1e-5)


def test_bert_learns_pairs_by_their_types(folder: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", ["train.steps=80", "batch.size=16", "batch.micro_size=0", "optim.lr=5e-3"]
    done(words(folder, "bert", "pairs", run, *steps), run)
    ours, valid = summary(run)["figures"], key_in(61, 2)
    assert ours["valid/accuracy"] > 0.9 > 0.7 > ours["baseline/majority_accuracy"]
    config = json.loads((run / "model/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "0", "1": "1"}
    found = logits(run, [(record["premise"], record["hypothesis"]) for record in valid], padded=True)
    labels = torch.tensor([record["label"] for record in valid])
    assert float(cross_entropy(found, labels)) == pytest.approx(ours["valid/loss"], rel=1e-4, abs=1e-6)


def test_numbers_are_predicted(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = ["train.steps=60", "batch.size=16", "batch.micro_size=0", "data.max_tokens=64", "optim.lr=5e-3"]
    said = done(words(folder, "policy", "lengths", run, *steps), run)
    assert "labels are numbers: regression" in said
    ours, valid = summary(run)["figures"], lengths(61, 2)
    targets = torch.tensor([record["label"] for record in valid])
    known = torch.tensor([record["label"] for record in lengths(480, 1)]).mean()
    assert ours["baseline/mean_rmse"] == pytest.approx(float((targets - known).square().mean().sqrt()), rel=1e-5)
    assert ours["valid/rmse"] == pytest.approx(math.sqrt(ours["valid/loss"]))
    assert ours["valid/rmse"] < 0.5 * ours["baseline/mean_rmse"]
    assert json.loads((run / "model/config.json").read_text())["problem_type"] == "regression"
    found = logits(run, [(record["sentence"],) for record in valid], padded=True, behind="<|end|>")
    assert found.shape == (61, 1)
    assert float(mse_loss(found.squeeze(1), targets)) == pytest.approx(ours["valid/loss"], rel=1e-3)


def test_a_classifier_goes_on_with_its_head(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done(words(folder, "policy", "verse", first), first)
    argv = words(folder, "policy", "verse", second, f"init_from={first / 'model'}")
    done(argv, second)
    assert summary(second)["figures"]["valid/loss/before"] == summary(first)["figures"]["valid/loss"]
    log = tmp_path / "log"
    other = words(folder, "policy", "verse", tmp_path / "third", f"init_from={first / 'model'}")
    for labels, line in {
        "five,seven,mixed": "is a classifier of 2 outputs, the data need 3",
        "seven,five": "is a classifier of five, seven, the data have seven, five; if they are the same, say",
    }.items():
        code, said = end(fork([*other, f"classify.labels=[{labels}]"], log), log)
        assert code == 2
        assert line in said.splitlines()[-1]


# --- stopped, and in layouts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done(words(folder, "policy", "verse", run, "checkpoint.every=2"), run)
    return run


@pytest.mark.parametrize(("name", "code", "where"), [("SIGKILL", -9, "TorchEngine.step"), ("SIGTERM", 143, "")])
def test_stopped_and_continued_it_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, undisturbed: Path, name: str, code: int, where: str
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    argv = words(folder, "policy", "verse", run, "checkpoint.every=2")
    place = f"framework.engine.torch_engine:{where} 4" if where else "framework.stages.classify:read_targets 1"
    assert end(fork(argv, log, f"{name} {place}"), log)[0] == code
    assert end(fork(argv, log), log)[0] == 0
    first, second = (folder / "model/model.safetensors" for folder in (run, undisturbed))
    assert first.read_bytes() == second.read_bytes()
    assert measured(run / "metrics.jsonl") == measured(undisturbed / "metrics.jsonl")


def as_rank(runtime: Runtime, argv: Sequence[str]) -> int:
    os.environ |= {name: str(n) for name, n in (("RANK", runtime.rank), ("WORLD_SIZE", runtime.world_size))}
    return main(list(argv))


NIGHTLY = [pytest.param(layout, marks=pytest.mark.nightly) for layout in ("ddp", "fsdp", "cp", "zero3")]


@pytest.mark.parametrize("layout", ["tp", "pp", *NIGHTLY])
def test_two_ranks_end_where_one_does(folder: Path, tmp_path: Path, undisturbed: Path, layout: str) -> None:
    """61 texts to validate on do not divide by two ranks."""
    argv = words(folder, "policy", "verse", tmp_path / "run", f"parallel={layout}", "batch.micro_size=1")
    assert run_ranks(as_rank, 2, argv, timeout_s=240, deadline_s=120) == [0, 0]
    theirs, ours = (summary(run)["figures"] for run in (undisturbed, tmp_path / "run"))
    names = [name for name in theirs if name.startswith(("valid/", "train/loss", "train/grad"))]
    assert len(names) > 5
    assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-3, abs=1e-5)


def test_with_an_adapter_the_head_learns_too(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = done(words(folder, "bert", "pairs", run, "lora.rank=2", "lora.targets=[q,v]"), run)
    assert "parameters learn (" in said
    assert summary(run)["figures"]["valid/loss"] != summary(run)["figures"]["valid/loss/before"]
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "bert")
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    x = torch.tensor([[2, 5, 7, 8, 3]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(x).logits, merged(x).logits, rtol=0, atol=1e-5)


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_s_own_data_command_and_labelling(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs/classify.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    _, labelling, data, command = blocks
    exec(compile(data, "docs/classify.md", "exec"), {})
    argv = shlex.split(command.replace("runs/pretrain/model", str(folder / "policy")))[1:]
    done([*argv, "threads=1", "tracking.progress=false"], tmp_path / "run")
    assert summary(tmp_path / "runs/classify")["figures"]["valid/accuracy"] > 0.9
    exec(compile(labelling, "docs/classify.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["five", "seven"]


# --- before it begins ----------------------------------------------------------------------------------------------


def test_prepared_ahead_and_explained(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words(folder, "bert", "pairs", tmp_path / "run", f"data.cache={tmp_path / 'ahead'}")
    argv.remove(f"extensions=[{ASK}]")  # here it would be imported for good, and ask nothing later
    assert main(["data", "prepare", *argv]) == 0
    assert "w" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "ahead").rglob("*")}
    done(argv, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ahead").rglob("*")} == made
    assert main(["explain", *argv]) == 0
    assert "one optimizer step = 4 sequences x 24 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("train", "valid", "line"),
    [
        ([{"text": "花", "label": "a"}] * 9, None, "data.train has one label alone, 'a'"),
        ([{"text": "花", "label": n % 2} for n in range(9)] + [{"text": "月"}], None, "needs the field 'label'"),
        ([{"text": "花", "label": n % 2} for n in range(9)], [{"text": "月", "label": 2}], "label '2' is none that"),
        ([{"text": "花", "label": label} for label in (0.5, "x")] * 4, None, "label 'x' is a word, where others"),
    ],
)
def test_labels_that_cannot_be_learned_are_one_line(
    folder: Path, tmp_path: Path, train: Content, valid: Content | None, line: str
) -> None:
    write(tmp_path / "bad.train.jsonl", train)
    write(tmp_path / "bad.valid.jsonl", train if valid is None else valid)
    argv, log = words(tmp_path, "policy", "bad", tmp_path / "run", f"init_from={folder / 'policy'}"), tmp_path / "log"
    code, said = end(fork(argv, log), log)
    assert code == 2, said
    assert line in said.splitlines()[-1]
    assert "Traceback" not in said
