"""Models that see ahead, as a user trains them: an encoder by masked tokens, a prefix model through every stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from framework.main import main
from framework.models import hub
from tests.tiny import WORDS, forked

_QUIET = ["device=cpu", "threads=1", "tracking.progress=false", "tracking.every=1"]
_BERT = [
    "model=bert-base-uncased", "model.vocab_size=0", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2",
    "model.intermediate_size=64", "model.max_positions=64",
]  # fmt: skip


def figures(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "summary.json").read_text())["figures"]
    return found


def pretrain(folder: Path, *words: str) -> list[str]:
    """The words of a short run on the corpus of verse."""
    return [
        "pretrain", "data.train=[corpora/tang/valid.txt]", "data.valid=[corpora/tang/valid.txt]", "data.max_tokens=64",
        f"tokenizer={folder}/runs/tokenizer/model", *_QUIET, *words,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of a tokenizer that has a mask token and of BERT, pretrained by it."""
    folder = tmp_path_factory.mktemp("encoder")
    tokens = ["data.train=[corpora/tang/train.txt]", "tokenizer.kind=character", "tokenizer.vocab_size=2816"]
    forked("tokenizer", *tokens, "tokenizer.mask=true", "tracking.progress=false", cwd=folder)
    short = ["train.steps=30", "batch.size=8", "optim.lr=0.01", "train.validate_every=30"]
    forked(*pretrain(folder, *_BERT, *short), cwd=folder)
    return folder


def test_an_encoder_learns_hidden_tokens_and_opens_in_transformers(encoder: Path) -> None:
    folder = encoder / "runs/pretrain"
    assert figures(folder)["valid/loss"] < figures(folder)["valid/loss/before"] - 0.3
    assert "valid/nats_per_byte" not in figures(folder)  # hidden tokens are no measure of a text
    theirs: Any
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.mask_token == "<|mask|>"
    x = tokenizer("春風<|mask|>又綠", return_tensors="pt", return_token_type_ids=False).input_ids
    assert (x == tokenizer.mask_token_id).sum() == 1
    ours = hub.load(folder / "model")
    torch.testing.assert_close(ours.logits(ours(x)), theirs(x).logits, rtol=0, atol=1e-4)


def test_an_encoder_becomes_a_reward_model(encoder: Path) -> None:
    words = [
        "data.train=[corpora/tang/preference.train.jsonl]", "data.max_tokens=64", "batch.size=4", "train.steps=2",
        "train.last_layers=1",
    ]  # fmt: skip
    forked("reward_model", f"init_from={encoder}/runs/pretrain/model", *words, *_QUIET, cwd=encoder)
    folder = encoder / "runs/reward_model/model"
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["pretrain", "language.objective=causal"], "language.objective=causal does not go with model.architecture="),
        (["pretrain", "mlm_probability=0.15"], "language.share"),
        (
            ["sft", "data.train=[corpora/tang/sft.valid.jsonl]", "data.max_tokens=64"],
            "sft does not train a model of architecture=encoder",
        ),
        (["ppo", "ppo.reward=verse_form", "data.train=[corpora/tang/prompts.test.jsonl]"], "writes no text"),
        (["generate"], "writes no text"),
    ],
)
def test_what_an_encoder_is_not_for_is_refused(
    words: list[str], line: str, encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(encoder)
    model = str(encoder / "runs/pretrain/model")
    stage, *more = words
    if stage == "generate":
        command = ["generate", model, "春"]
    elif stage == "pretrain":
        command = [*pretrain(encoder, *_BERT, f"run.dir={encoder}/refused"), *more]
    else:
        command = [stage, f"init_from={model}", *more, *_QUIET[:3], f"run.dir={encoder}/refused"]
    assert main(command) == 2
    assert line in capsys.readouterr().err


def test_a_tokenizer_without_a_mask_token_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = ["data.train=[corpora/tang/valid.txt]", "tokenizer.kind=character", "tokenizer.vocab_size=900"]
    forked("tokenizer", *tokens, "tracking.progress=false", cwd=tmp_path)
    assert main(pretrain(tmp_path, *_BERT)) == 2
    assert "needs a tokenizer with a mask token" in capsys.readouterr().err


def test_t5_learns_hidden_spans_and_opens_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = ["data.train=[corpora/tang/valid.txt]", "tokenizer.kind=character", "tokenizer.vocab_size=900"]
    forked("tokenizer", *tokens, "tokenizer.sentinels=20", "tracking.progress=false", cwd=tmp_path)
    t5 = [
        "model=t5-small", "model.vocab_size=0", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2",
        "model.head_dim=16", "model.intermediate_size=64",
    ]  # fmt: skip
    short = ["train.steps=20", "batch.size=8", "optim.lr=0.01", "train.validate_every=20", "language.span=2"]
    forked(*pretrain(tmp_path, *t5, *short), cwd=tmp_path)
    folder = tmp_path / "runs/pretrain"
    assert figures(folder)["valid/loss"] < figures(folder)["valid/loss/before"] - 0.3
    theirs: Any
    theirs, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert theirs.config.decoder_start_token_id == tokenizer.pad_token_id == theirs.config.pad_token_id
    read = tokenizer("春風<extra_id_0>又綠<extra_id_1>", return_tensors="pt").input_ids
    written = torch.tensor([[tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>"), 30]])
    ours = hub.load(folder / "model")
    mine = ours.logits(ours(written, encoder_tokens=read))
    torch.testing.assert_close(mine, theirs(read, decoder_input_ids=written).logits, rtol=0, atol=1e-4)
    assert theirs.generate(read, max_new_tokens=4).shape[1] > 1
    capsys.readouterr()
    ask = ["generate", str(folder / "model"), "春風", "--temperature", "0", "--max-tokens", "4", "--device", "cpu"]
    assert main(ask) == 0
    x = torch.tensor([[*tokenizer("春風").input_ids, tokenizer.eos_token_id]])  # as what it was trained to read ends
    answer = tokenizer.decode(theirs.generate(x, max_new_tokens=4, do_sample=False)[0], skip_special_tokens=True)
    assert capsys.readouterr().out == f"春風\t{answer}\n"
    ppo = ["ppo", f"init_from={folder}/model", "ppo.reward=verse_form", "data.train=[corpora/tang/prompts.test.jsonl]"]
    assert main([*ppo, *_QUIET[:3]]) == 2
    assert "ppo does not train a model of architecture=encoder_decoder" in capsys.readouterr().err
    assert main(["sft", f"init_from={folder}/model", "data.train=[corpora/tang/sft.valid.jsonl]", *_QUIET[:3]]) == 2
    assert "sft does not train a model of architecture=encoder_decoder" in capsys.readouterr().err


def test_glm_learns_to_fill_blanks(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer's mask token stands for a span; the folder comes back as it is."""
    monkeypatch.chdir(encoder)
    glm = [
        "model=chatglm-6b", "model.vocab_size=0", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2",
        "model.intermediate_size=64", "name=glm",
    ]  # fmt: skip
    short = ["train.steps=20", "batch.size=8", "optim.lr=0.01", "train.validate_every=20"]
    forked(*pretrain(encoder, *glm, *short), cwd=encoder)
    folder = encoder / "runs/glm"
    assert figures(folder)["valid/loss"] < figures(folder)["valid/loss/before"] - 0.3
    said = json.loads((folder / "model/config.json").read_text())
    assert (said["model_type"], said["position_encoding_2d"]) == ("chatglm", True)
    assert hub.load(folder / "model").config.num_layers == 1
    assert main(["sft", f"init_from={folder}/model", "data.train=[corpora/tang/sft.valid.jsonl]", *_QUIET[:3]]) == 2
    assert "sft does not train a model of position=rotary_2d" in capsys.readouterr().err


def test_a_prefix_model_goes_through_every_stage(tmp_path: Path) -> None:
    """Prompts are seen whole by trainer and generator alike: their log-probs agree to the last bit."""
    words = ["pretrain.model.family=framework", "pretrain.model.architecture=prefix"]
    forked("pipeline", *WORDS, *words, cwd=tmp_path)
    runs = tmp_path / "runs/quickstart"
    assert figures(runs / "sft")["valid/loss"] < figures(runs / "sft")["valid/loss/before"]
    last = json.loads((runs / "ppo/metrics.jsonl").read_text().splitlines()[-1])
    assert last["ppo/generator_gap/max"] == last["sync/canary_gap"] == 0
