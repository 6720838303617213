"""The command line as a user types it: help at once, every refusal one line with exit code 2."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from framework.core.errors import UsageError
from framework.main import compose, main
from framework.optim.config import Schedule
from framework.parallel.config import Shard
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
    assert config.parallel.shard is Shard.FULL
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


REFUSED = [
    (["sfft"], "unknown command 'sfft': did you mean 'sft'?"),
    (["sft", "optim.lrr=1"], "unknown key 'optim.lrr': did you mean 'optim.lr'?"),
    (["sft", "batchs.size=1"], "unknown key 'batchs': did you mean 'batch'?"),
    (["sft", "+learn=1"], "unknown key 'learn'"),
    (["sft", "optim.lr=fast"], "optim.lr=fast is not a number"),
    (["sft", "seed=1.5"], "seed=1.5 is not a whole number"),
    (["sft", "optim.schedule=cosin"], "optim.schedule=cosin: did you mean 'cosine'?"),
    (["sft", "parallel=fsd"], "unknown choice parallel=fsd: did you mean 'fsdp'?"),
    (["sft", "tracking=wadb"], "unknown choice tracking=wadb: did you mean 'wandb'?"),
    (["sft", "experiment=nothing"], "unknown choice experiment=nothing"),
    (["sft", "lr"], "'lr' is not of the form key=value"),
    (["sft", "data.train=[a]"], "sft starts from a model: init_from=FOLDER"),
    (["sft", "init_from=base"], "data.train is empty"),
    (["sft", *SFT, "batch.micro_size=5"], "batch.micro_size=5 does not divide the 32 sequences"),
    (["sft", *SFT, "data.valid=[b,0.1]"], "data.valid=b,0.1: give files, or one share of data.train such as 0.02"),
    (["sft", *SFT, "engine.strict=true", "engine.compile=true"], "engine.strict=true needs engine.compile=false"),
    (["sft", *SFT, "data.valid=2"], "data.valid=2.0 must be between 0 and 1"),
    (["sft", *SFT, "device=tpu"], "device=tpu: choose auto, cpu or cuda"),
    (["sft", *SFT, "model.num_heads=30"], "model.hidden_size=128 is not divisible by model.num_heads=30"),
    (["pretrain", "data.train=[a]"], "pretraining needs exactly one of tokenizer=FOLDER"),
    (["pretrain", "data.train=[a]", "tokenizer=t", "model=huge"], "unknown choice model=huge"),
    (
        ["ppo", *PPO, "batch.size=7"],
        "batch.size=7 does not divide rollout.prompts x rollout.samples = 32; choose 1, 2, 4",
    ),
    (["ppo", *PPO, "cluster.workers=3", "cluster=ray"], "batch.size=32 is not divisible by 3 data ranks"),
    (["ppo", *PPO, "cluster.workers=2"], "cluster.workers=2 needs cluster=ray"),
    (["ppo", *PPO, "rollout.temperature=0"], "rollout.temperature=0.0 must be positive"),
    (["ppo", "init_from=base", "data.train=[p]"], "ppo needs a reward model: reward_from=FOLDER"),
    (["ppo", "init_from=base", "data.train=[p]", "ppo.reward=model"], "or another reward: ppo.reward=NAME"),
    (
        ["ppo", *PPO, "ppo.reward=assigned_rime"],
        "ppo.reward: unknown reward 'assigned_rime': did you mean 'assigned_rhyme'",
    ),
    (["ppo", *PPO, "ppo.advantage=gea"], "ppo.advantage: unknown advantage 'gea': did you mean 'gae'?"),
    (["ppo", *PPO, "ppo.policy_loss=clipp"], "ppo.policy_loss: unknown policy_loss 'clipp': did you mean 'clip'?"),
    (["sft", *SFT, "data.format=alpacca"], "data.format: unknown data_format 'alpacca': did you mean 'alpaca'?"),
    (["sft", *SFT, "evaluation.tasks=[verse]"], "evaluation.tasks: unknown task 'verse'"),
    (["sft", *SFT, "tracking.kind=wanb"], "tracking.kind: unknown tracker 'wanb': did you mean 'wandb'?"),
    (["sft", *SFT, "extensions=[mine.py]"], "extensions: no such file: mine.py"),
    (["evaluate", "init_from=base"], "evaluation.tasks is empty"),
    (["tokenizer"], "data.train is empty"),
    (["pipeline"], "a pipeline names its stages; start from experiment=quickstart"),
    (["pipeline", "experiment=quickstart", "sft.optim.lrr=1"], "unknown key 'optim.lrr'"),
    (["pipeline", "experiment=quickstart", "nonsense=1"], "unknown key 'nonsense'"),
    (["explain"], "explain takes the words of a stage"),
    (["doctor", "now"], "doctor takes no words, got: now"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_a_wrong_recipe_gets_one_clear_line_and_exit_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert line in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir()), "a refusal leaves nothing behind"


def test_unknown_stage_from_python_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="did you mean 'pretrain'"):
        compose("pretain", [])


def test_explain_prints_recipe_arithmetic_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer=t", "data.train=[a]", "model.vocab_size=1000", "batch.size=32", "batch.micro_size=8"]
    assert main(["explain", "pretrain", *words]) == 0
    text = capsys.readouterr().out
    assert "one optimizer step = 32 sequences x 128 tokens = 4,096 tokens" in text
    assert "4 micro-batches of 8 sequences" in text
    assert "states on one rank" in text
