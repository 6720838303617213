"""What makes two runs the same run."""

from pathlib import Path
from typing import Any

import pytest

from framework.core.errors import UsageError
from framework.tracking.identity import identify, refuse

RECIPE: dict[str, Any] = {
    "stage": "sft",
    "seed": 0,
    "optim": {"lr": 1e-5, "betas": [0.9, 0.95]},
    "batch": {"size": 8, "micro_size": 2},
    "cluster": {"workers": 1},
    "train": {"steps": 100, "epochs": 1.0, "validate_every": 10},
}
IGNORE = ("cluster", "batch.micro_size", "run")


def changed(**dotted: Any) -> dict[str, Any]:
    recipe = {k: dict(v) if isinstance(v, dict) else v for k, v in RECIPE.items()}
    for key, value in dotted.items():
        group, _, name = key.partition("__")
        if name:
            recipe.setdefault(group, {})[name] = value
        else:
            recipe[group] = value
    return recipe


def test_ignored_keys_and_lengths_do_not_change_the_digest() -> None:
    same = identify(RECIPE, {"init_from": "a"}, IGNORE).digest
    for recipe in (
        changed(cluster__workers=4), changed(cluster__new=1), changed(batch__micro_size=8), changed(run__dir="x"),
        changed(train__steps=7), changed(train__epochs=3.0),
    ):  # fmt: skip
        assert identify(recipe, {"init_from": "a"}, IGNORE).digest == same


def test_everything_else_does() -> None:
    digests = [
        identify(recipe, parents, IGNORE).digest
        for recipe, parents in [
            (RECIPE, {}), (RECIPE, {"init_from": "a"}), (RECIPE, {"init_from": "b"}), (changed(seed=1), {}),
            (changed(optim__lr=2e-5), {}), (changed(optim__betas=[0.9, 0.99]), {}), (changed(batch__size=16), {}),
            (changed(train__validate_every=20), {}), (changed(batch__micro=2), {}), (changed(clusters=1), {}),
        ]
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)


def test_a_recipe_and_its_yaml_are_the_same() -> None:
    """Tuples and small floats come back from YAML as lists and as the floats they were; none is not said."""
    recipe = identify(RECIPE, {}, IGNORE)
    assert recipe.recipe["optim.lr"] == 1e-5
    for same in (changed(optim__betas=(0.9, 0.95)), changed(optim__new=None)):
        assert recipe.conflicts(identify(same, {}, IGNORE)) == {}
        assert recipe.digest == identify(same, {}, IGNORE).digest


@pytest.mark.parametrize(
    ("now", "conflict"),
    [
        ({"train__steps": 200}, {}),
        ({"train__steps": 50}, {"train.steps": (100, 50)}),
        ({"train__steps": 0, "train__epochs": 3.0}, {}),
        ({"train__epochs": 0.5}, {"train.epochs": (1.0, 0.5)}),
        ({"seed": 3}, {"seed": (0, 3)}),
    ],
)
def test_raised_lengths_continue_and_lowered_ones_do_not(now: dict[str, Any], conflict: dict[str, Any]) -> None:
    assert identify(RECIPE, {}, IGNORE).conflicts(identify(changed(**now), {}, IGNORE)) == conflict


def test_parents_are_compared_by_role() -> None:
    old, new = identify(RECIPE, {"a": "1", "b": "2"}, ()), identify(RECIPE, {"a": "1", "c": "2"}, ())
    assert old.conflicts(new) == {"parents.b": ("2", None), "parents.c": (None, "2")}


def test_the_refusal_names_keys_values_and_ways_out() -> None:
    with pytest.raises(UsageError, match=r"runs/sft holds .*\(optim.lr: 0.1 there, 0.2 now\).*run.dir") as caught:
        refuse(Path("runs/sft"), {"optim.lr": (0.1, 0.2)})
    assert caught.value.exit_code == 2
