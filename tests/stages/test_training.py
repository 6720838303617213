"""What a recipe may say of a model that a folder brings."""

import pytest

from framework.core.errors import UsageError
from framework.models.config import ModelConfig, MoeConfig
from framework.stages.training import balanced, refuse_other

MIXTURE = ModelConfig(moe=MoeConfig(experts=4, balance=0.01))


def test_a_recipe_balances_the_experts_of_a_folder_and_makes_none() -> None:
    given = ModelConfig(moe=MoeConfig(balance=0.2))
    refuse_other(given, MIXTURE, "folder")
    assert balanced(MIXTURE, 0.2).moe == MoeConfig(experts=4, balance=0.2)
    assert balanced(MIXTURE, 0.0) == MIXTURE
    with pytest.raises(UsageError, match=r"model\.moe=.*but the model of init_from=folder has"):
        refuse_other(ModelConfig(moe=MoeConfig(experts=8)), MIXTURE, "folder")
    with pytest.raises(UsageError, match=r"model\.moe=.*but the model of init_from=folder has"):
        refuse_other(given, ModelConfig(), "folder")
