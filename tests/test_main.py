"""The command line as a user types it: help at once, every refusal one line with exit code 2."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from framework.core.errors import UsageError
from framework.main import compose, main
from framework.optim.config import Schedule
from framework.stages.config import STAGES, PpoRun, SftRun

SFT = ["init_from=base", "data.train=[a.jsonl]"]
PPO = ["init_from=base", "reward_from=rm", "data.train=[p.jsonl]"]


def test_help_and_refusals_never_import_torch() -> None:
    code = (
        "import sys; from framework.main import main\n"
        "assert main(['--help']) == 0 and main(['sft', '--help']) == 0\n"
        "assert main(['sft', 'optim.lrr=1']) == 2 and main(['pto']) == 2\n"
        "heavy = {'torch', 'transformers', 'ray', 'deepspeed', 'wandb'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_stage_help_lists_the_keys_and_choices(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([stage, "--help"]) == 0
    text = capsys.readouterr().out
    assert "seed=0" in text
    assert "tracking=none|swanlab|tensorboard|wandb" in text


def test_under_a_hundred_keys_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES:
        main([stage, "--help"])
        keys = capsys.readouterr().out.split("keys and defaults\n")[1].splitlines()
        assert len(keys) < 100, stage


def test_words_become_one_frozen_config() -> None:
    (config,) = compose("sft", [*SFT, "parallel=fsdp", "optim.schedule=wsd", "batch.size=8", "name=mine"])
    assert isinstance(config, SftRun)
    assert config.parallel.shard == 0
    assert config.optim.schedule is Schedule.WSD
    assert config.folder == Path("runs/mine")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_one_file_needs_no_brackets() -> None:
    (config,) = compose("sft", ["init_from=base", "data.train=a.jsonl"])
    assert isinstance(config, SftRun)
    assert config.data.train == ["a.jsonl"]


def test_ppo_width_is_constant_and_a_multiple_of_eight() -> None:
    (config,) = compose("ppo", [*PPO, "rollout.max_prompt_tokens=11", "rollout.max_tokens=18"])
    assert isinstance(config, PpoRun)
    assert config.width == 32


def test_unknown_stage_from_python_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="did you mean 'pretrain'"):
        compose("pretain", [])


def test_explain_prints_recipe_arithmetic_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer=t", "data.train=[a]", "model.vocab_size=1000", "batch.size=32", "batch.micro_size=8"]
    assert main(["explain", "pretrain", *words]) == 0
    text = capsys.readouterr().out
    assert "one optimizer step = 32 sequences x 128 tokens = 4,096 tokens" in text
    assert "4 micro-batches of 8 sequences" in text
    assert "fullest rank under parallel=ddp, 1 rank holds" in text
    assert "states: weights" in text
    assert "activations" in text


def test_explain_counts_for_the_layout_s_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer=t", "data.train=[a]", "model.vocab_size=1024", "batch.size=4", "engine.precision=bf16"]

    def states(*more: str) -> str:
        assert main(["explain", "pretrain", *words, *more]) == 0
        return capsys.readouterr().out.partition("# states: ")[2].partition("\n")[0]

    one, two = (float(states("parallel=fsdp", f"cluster.workers={n}").split()[-2]) for n in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.01)
    assert main(["explain", "pretrain", *words, "parallel=fsdp", "cluster.workers=2"]) == 0
    assert "on one data rank: 1 micro-batches of 2 sequences" in capsys.readouterr().out
    assert main(["explain", "pretrain", *words, "parallel=tp", "parallel.tensor=2"]) == 0
    assert "# memory: parallel.tensor=2 needs a multiple of 2 processes" in capsys.readouterr().out
    assert main(["explain", "pretrain", *words, "parallel=tp", "cluster.workers=3"]) == 0
    assert "# memory: model.num_heads=4 is not divisible by parallel.tensor=3" in capsys.readouterr().out


def test_explain_reads_the_architecture_of_init_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.train=[a]", f"init_from={tmp_path}"]
    assert main(["explain", "sft", *words]) == 0
    assert "memory: known once" in capsys.readouterr().out
    model = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 4, "intermediate_size": 96, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(model))
    for stage in ("sft", "reward_model", "preference"):
        assert main(["explain", stage, *words]) == 0
        assert "133,952 parameters" in capsys.readouterr().out
