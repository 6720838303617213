"""The registry: names found, near misses answered, double entries refused."""

import pytest

from framework.core import registry
from framework.core.errors import UsageError
from framework.core.registry import forget, lookup, names, register


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {kind: {} for kind in registry.KINDS})


def test_what_is_registered_is_found_and_returned_unchanged() -> None:
    def reward() -> int:
        return 3

    assert register("reward", "three")(reward) is reward
    assert lookup("reward", "three") is reward
    assert names("reward") == ["three"]
    assert names("task") == []


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    register("advantage", "grpo")(lambda: None)
    register("advantage", "gae")(lambda: None)
    with pytest.raises(UsageError, match=r"unknown advantage 'gea': did you mean 'gae'\? Choose one of: gae, grpo"):
        lookup("advantage", "gea")


@pytest.mark.parametrize("use", [lambda: register("rewards", "x"), lambda: lookup("rewards", "x")])
def test_an_unknown_kind_is_answered_with_the_nearest_one(use: object) -> None:
    with pytest.raises(UsageError, match="unknown kind 'rewards': did you mean 'reward'"):
        use()  # type: ignore[operator]


def test_two_objects_under_one_name_are_refused_and_both_are_named() -> None:
    def first() -> None: ...
    def second() -> None: ...

    register("tracker", "t")(first)
    with pytest.raises(UsageError, match=r"tracker 't' is registered twice: by .*first and by .*second"):
        register("tracker", "t")(second)
    assert lookup("tracker", "t") is first


def test_importing_a_module_again_is_no_double_entry() -> None:
    def make() -> type:
        class Task:
            pass

        return Task

    register("task", "t")(make())
    again = make()
    register("task", "t")(again)
    assert lookup("task", "t") is again


def test_what_a_module_entered_can_be_forgotten() -> None:
    def entry(module: str) -> object:
        return type("Entry", (), {"__module__": module})

    for number, module in enumerate(("mine", "mine.rules", "miner", "other")):
        register("reward", str(number))(entry(module))
    register("task", "task")(entry("mine"))
    forget("mine")
    assert names("reward") == ["2", "3"]
    assert names("task") == []
