"""Every recipe composes, opens with the command that runs it, and its model builds on the meta device."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from framework.core.config import recipes_folder
from framework.main import compose
from framework.models.presets import preset
from framework.models.transformer import Transformer
from framework.stages.config import STAGES, TrainingRun

RECIPES = recipes_folder()
EXPERIMENTS = sorted(p.relative_to(RECIPES / "experiment") for p in (RECIPES / "experiment").rglob("*.yaml"))
MODELS = sorted(p.stem for p in (RECIPES / "model").glob("*.yaml"))


def stage_of(experiment: Path) -> str:
    return experiment.stem if experiment.stem in STAGES else "pipeline"


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_an_experiment_composes_and_its_model_builds(experiment: Path) -> None:
    for config in compose(stage_of(experiment), [f"experiment={experiment.with_suffix('')}"]):
        if isinstance(config, TrainingRun) and not config.init_from:
            with torch.device("meta"):
                Transformer(dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 1000))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_an_experiment_opens_with_the_command_that_runs_it(experiment: Path) -> None:
    lines = (RECIPES / "experiment" / experiment).read_text().splitlines()
    command = f"# framework {stage_of(experiment)} experiment={experiment.with_suffix('')}"
    assert any(line.startswith(command) for line in lines[:3]), command


@pytest.mark.parametrize("model", MODELS)
def test_a_model_recipe_composes_and_builds(model: str) -> None:
    (config,) = compose("pretrain", ["tokenizer=t", "data.train=[a]", f"model={model}"])
    assert isinstance(config, TrainingRun)
    assert config.model == preset(model)
    with torch.device("meta"):
        Transformer(dataclasses.replace(config.model, vocab_size=32000))


@pytest.mark.parametrize("model", MODELS)
def test_a_published_model_names_its_paper(model: str) -> None:
    text = (RECIPES / "model" / f"{model}.yaml").read_text()
    assert "vocab_size" not in text or re.match(r"# .*\b20\d\d, ", text)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_recipe_opens_with_a_command(stage: str) -> None:
    assert (RECIPES / f"{stage}.yaml").read_text().startswith(f"# framework {stage} ")


def test_recipes_are_short_lists_of_differences() -> None:
    for path in RECIPES.rglob("*.yaml"):
        keys = yaml.safe_load(path.read_text()) or {}
        assert len(path.read_text().splitlines()) <= 60, path
        assert isinstance(keys, dict)
