"""Other frameworks' words: every answer is a real key, and a user who types one is told ours in one line."""

import pytest

from framework.core.errors import UsageError
from framework.main import compose, main
from framework.stages.config import STAGES
from framework.stages.peers import OURS, ours_for
from framework.stages.refusal import defaults_of, groups

KEYS = {stage: {*defaults_of(stage), *groups()} for stage in STAGES}


def test_every_answer_is_a_key_of_some_stage_and_no_word_is_one() -> None:
    everywhere = set().union(*KEYS.values())
    assert {ours for answers in OURS.values() for ours in answers} <= everywhere
    assert not OURS.keys() & (everywhere - {"reward_model", "pretrain"})


@pytest.mark.parametrize(
    ("stage", "word", "ours"),
    [
        ("sft", "learning_rate", "optim.lr"),
        ("sft", "per_device_train_batch_size", "batch.micro_size"),
        ("sft", "cutoff_len", "data.max_tokens"),
        ("ppo", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", "batch.micro_size"),
        ("ppo", "data.train_batch_size", "rollout.prompts"),
        ("sft", "train_batch_size", "batch.size"),
        ("ppo", "--eps-clip", "ppo.clip_low"),
        ("ppo", "algorithm.adv_estimator", "ppo.advantage"),
        ("preference", "dpo_config.beta", "dpo.beta"),
        ("preference", "pref_ftx", "dpo.sft_coefficient"),
        ("ppo", "beta", "ppo.kl_coefficient"),
        ("sft", "adv_estimator", ""),  # no such thing in that stage
        ("sft", "optim.lr", ""),
    ],
)
def test_the_answer_depends_on_the_stage(stage: str, word: str, ours: str) -> None:
    assert ours_for(word, KEYS[stage]) == ours


@pytest.mark.parametrize(
    "words", [["learning_rate=1"], ["--learning_rate", "1"], ["+learning_rate=1"], ["-m", "learning_rate=1,2"]]
)
def test_however_it_is_typed_the_line_names_ours(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", *words]) == 2
    error = capsys.readouterr().err
    assert "unknown key 'learning_rate': it is set by optim.lr here" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("word", ["sft.learning_rate=1", "learning_rate=1"])
def test_in_a_pipeline_too(word: str) -> None:
    with pytest.raises(UsageError, match=r"'learning_rate': it is set by optim\.lr here"):
        compose("pipeline", ["experiment=quickstart", word])
