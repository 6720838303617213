"""What PPO's cast is not opened for."""

from dataclasses import replace

import pytest

from framework.core.errors import UsageError
from framework.main import compose
from framework.models.config import Architecture, ModelConfig, RopeScaling, Scaling
from framework.stages.config import PpoRun
from framework.stages.roles import _refuse_unfit


def test_models_that_ppo_cannot_train_or_generate_from_are_refused() -> None:
    words = "init_from=a reward_from=b data.train=[p] rollout.max_prompt_tokens=20 rollout.max_tokens=12"
    (config,) = compose("ppo", words.split())
    assert isinstance(config, PpoRun)
    dynamic = ModelConfig(rope_scaling=RopeScaling(Scaling.DYNAMIC, 2.0, 32))
    _refuse_unfit(config, dynamic)
    with pytest.raises(UsageError, match=r"max_prompt_tokens \+ rollout\.max_tokens = 32 is longer than 31"):
        _refuse_unfit(config, replace(dynamic, rope_scaling=replace(dynamic.rope_scaling, original_positions=31)))
    with pytest.raises(UsageError, match="ppo does not train a model of architecture=encoder_decoder"):
        _refuse_unfit(config, ModelConfig(Architecture.ENCODER_DECODER))
