"""docs/models.md as its reader runs it: commands and Python, in order, in a folder of their own; and what it quotes."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

from framework.core.registry import lookup, names
from framework.main import compose, main
from framework.models.hub import load
from framework.stages.config import PretrainRun
from tests.tiny import forked

PAGE = (Path(__file__).resolve().parents[1] / "docs/models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BASH = [block for kind, block in BLOCKS if kind == "bash"]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]
_QUIET = ["device=cpu", "threads=1", "tracking.progress=false"]


def commands(block: str) -> list[list[str]]:
    """The words of each `framework ...` line."""
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def printed(code: str) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "docs/models.md", "exec"), {})
    return out.getvalue().splitlines()


def test_the_page_s_way_in_on_and_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, (tokenizer,), (sft, compare), _, (explain, pretrain), (mixture, compared) = map(commands, BASH)
    forked(*tokenizer, cwd=tmp_path)
    printed(PYTHON[0])
    assert printed(PYTHON[1])[-2:] == ["True True", "tensor(True)"]
    forked(*sft, *_QUIET, "data.train=[corpora/tang/sft.valid.jsonl]", cwd=tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained("runs/sft/model")
    assert type(model) is transformers.Glm4ForCausalLM
    capsys.readouterr()
    assert main(compare) == 0
    (facts,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters"))
    assert facts.split() == ["parameters", *[f"{model.num_parameters():,}"] * 2]
    assert main(explain) == 0
    assert "1,235,814,400 parameters" in capsys.readouterr().out
    short = ["model.hidden_size=24", "data.train=[corpora/tang/valid.txt]", "train.steps=1", "batch.size=2"]
    forked(*pretrain, *short, *_QUIET, cwd=tmp_path)
    assert type(transformers.AutoModelForCausalLM.from_pretrained("runs/pretrain/model")).__name__ == "GPT2LMHeadModel"
    forked(*mixture, *short, "model.head_dim=8", "model.moe.first=1", *_QUIET, cwd=tmp_path)
    hold_mixture(tmp_path / "runs" / "mixture")
    assert main(compared) == 0
    assert "2 of 8 x 96, in 3 layers  8 of 128 x 768" in capsys.readouterr().out


def hold_mixture(run: Path) -> None:
    """Balanced on the way, which config.json keeps, and the same model in transformers."""
    said = json.loads((run / "model" / "config.json").read_text())
    assert (said["router_aux_loss_coef"], said["output_router_logits"], said["mlp_only_layers"]) == (0.01, True, [0])
    assert "train/balance" in (run / "metrics.jsonl").read_text()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info.values()), info
    x = torch.arange(6, 26).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(load(run / "model")(x), theirs.model(x).last_hidden_state, rtol=0, atol=1e-5)


def test_the_page_s_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer, pretrain, reward_model = commands(BASH[3])
    forked(*tokenizer, "tracking.progress=false", cwd=tmp_path)
    forked(*pretrain, *_QUIET, "train.steps=2", "data.train=[corpora/tang/valid.txt]", cwd=tmp_path)
    forked(*reward_model, *_QUIET, "train.steps=1", "evaluation.baselines=false", cwd=tmp_path)
    assert type(transformers.AutoModelForMaskedLM.from_pretrained("runs/encoder/model")).__name__ == "BertForMaskedLM"
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained("runs/reward_model/model")
    assert type(classifier).__name__ == "BertForSequenceClassification"


def test_what_the_page_quotes_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(BASH[0]):
        assert main(words) == 0
    out = capsys.readouterr().out
    for block in (block for kind, block in BLOCKS if kind == "text"):
        quoted = block.partition("\n")[2] if block.startswith("$ ") else block
        parts = [quoted] if quoted != block else re.split(r"^(?=model\.)", quoted, flags=re.MULTILINE)
        assert all(part in out for part in parts), quoted


def test_the_page_s_table_of_families_is_theirs() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    known = [lookup("family", name) for name in names("family")]
    assert sorted(rows) == sorted((f.model_type, f.causal.format(f.name), f.covers) for f in known)


def test_axes_that_the_page_puts_together_can_be_saved() -> None:
    combined = re.findall(r"`((?:model(?:\.\w+)?=\S+ ?)+)`", PAGE.partition("## Axes")[2])
    assert len(combined) == 2
    for words in combined:
        (config,) = compose("pretrain", ["tokenizer=t", "data.train=[a]", "model.vocab_size=9", *words.split()])
        assert isinstance(config, PretrainRun)
        lookup("family", config.model.family).config_to(config.model)
