"""A model folder extended by the command: old rows bit for bit, new rows as means; transformers loads it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from framework.core.records import whole
from framework.main import main
from framework.models.config import ModelConfig
from framework.models.hub import load, read_folder, save_weights
from framework.models.init import parameter_shapes, random_weights
from framework.tokenization.config import TokenizerConfig
from framework.tokenization.train import train

QUIET = ["device=cpu", "threads=1", "tracking.progress=false"]
WORDS = ["tokenizer", "extend", "m", "data.train=zh.txt", "tokenizer.new_tokens=20", *QUIET]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A working folder with a Chinese text; the architecture of a model whose tokenizer knows English."""
    monkeypatch.chdir(tmp_path)
    Path("zh.txt").write_text("明月光，低頭思故鄉明月\n" * 9)
    tokenizer = train(iter(["the cat sat on the mat " * 9]), TokenizerConfig(vocab_size=280))
    tokenizer.save("m")
    return ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)


def write(config: ModelConfig, classes: int = 0) -> None:
    read = random_weights(config, 1)
    weights = [(name, read(name, whole(shape))) for name, shape in parameter_shapes(config).items()]
    head = [("class_head.weight", torch.ones(classes, config.hidden_size))] if classes else []
    save_weights(config, weights + head, "m", classes=classes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 8])
def test_old_rows_and_answers_stay_and_new_rows_are_means(config: ModelConfig, tied: bool, padding: int) -> None:
    config = replace(config, tied=tied, vocab_size=config.vocab_size + padding)
    write(config)
    assert main(WORDS) == 0
    pieces = {int(i): parts for i, parts in json.loads(Path("runs/tokenizer/sub_pieces.json").read_text()).items()}
    (known, old, shapes), (grown, new, _) = read_folder("m"), read_folder("runs/tokenizer/model")
    assert grown == replace(known, vocab_size=max(config.vocab_size, max(pieces) + 1))
    first = min(pieces)
    for name, shape in shapes.items():
        before = old(name, whole(shape))
        after = new(name, whole((grown.vocab_size, *shape[1:]) if shape[0] == config.vocab_size else shape))
        if shape[0] != config.vocab_size:
            assert torch.equal(before, after), name
            continue
        assert torch.equal(before[:first], after[:first]), name
        for index, parts in pieces.items():
            assert torch.allclose(after[index], before[list(parts)].mean(0), rtol=1e-6), name
    tokens = torch.tensor([AutoTokenizer.from_pretrained("runs/tokenizer/model").encode("the cat sat")])
    models = load("m"), load("runs/tokenizer/model")
    ours, same = (model.logits(model(tokens)) for model in models)
    assert torch.allclose(ours[..., :first], same[..., :first], rtol=1e-6, atol=1e-6)
    theirs = AutoModelForCausalLM.from_pretrained("runs/tokenizer/model")
    assert theirs.config.vocab_size == grown.vocab_size
    assert torch.allclose(theirs(tokens).logits, same, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_grown_is_said_and_the_tokenizer_extended(
    config: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for name, make in {
        "alone": lambda: None,
        "small": lambda: write(replace(config, vocab_size=config.vocab_size - 4)),
        "classifier": lambda: write(config, classes=2),
        "foreign": lambda: Path("m/config.json").write_text('{"model_type": "bert"}'),
    }.items():
        make()
        assert main([*WORDS, f"name={name}"]) == 0
        said[name] = capsys.readouterr().out
        assert Path("runs", name, "model/tokenizer.json").exists()
        assert not Path("runs", name, "model/config.json").exists()
    assert "m holds a tokenizer alone: no model was resized" in said["alone"]
    assert f"it has {config.vocab_size - 4} rows for {config.vocab_size} old tokens" in said["small"]
    assert "it is a classifier" in said["classifier"]
    assert "the model was not resized: " in said["foreign"]
