"""What two run folders tell against each other: keys, origin, curves, and from which step on the weights differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from framework.core.errors import UsageError
from framework.tracking.comparison import Comparison, read_run, spread
from framework.tracking.config import DIGEST
from framework.tracking.folder import RunFolder

RECIPE = {"stage": "sft", "seed": 3, "optim": {"lr": 0.1}, "parallel": {"shard": "none"}, "tracking": {"every": 1}}


def make(
    path: Path,
    lines: Mapping[int, Mapping[str, float | str]] | None = None,
    final: Mapping[str, float] | None = None,
    parents: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """A run folder with those lines; finished where it has final figures."""
    folder = RunFolder.open(path, {**RECIPE, "run": {"dir": str(path)}, **changes}, parents)
    for step, figures in (lines or {}).items():
        folder.log(step, figures)
    if final is not None:
        folder.finish({"stage": "sft", "figures": final})
    folder.close()
    return path


def compared(left: Path, right: Path) -> Comparison:
    return Comparison(read_run(left), read_run(right))


def digests(*names: str) -> dict[int, dict[str, float | str]]:
    return {step: {DIGEST: name} for step, name in enumerate(names)}


def test_keys_that_differ_with_both_values_less_where_the_runs_lie(tmp_path: Path) -> None:
    left, right = make(tmp_path / "a"), make(tmp_path / "b", optim={"lr": 0.2, "clip": 1.0})
    assert compared(left, right).recipe == {"optim.lr": (0.1, 0.2), "optim.clip": (None, 1.0)}
    assert compared(left, left).recipe == {}


def test_parents_are_known_at_once_versions_once_both_have_finished(tmp_path: Path) -> None:
    left = make(tmp_path / "a", final={}, parents={"init_from": "aa"})
    running = make(tmp_path / "b", parents={"init_from": "bb"})
    assert compared(left, running).origin == {"parents.init_from": ("aa", "bb")}
    other = make(tmp_path / "c", final={}, parents={"init_from": "aa"}, seed=4)
    (other / "summary.json").write_text((other / "summary.json").read_text().replace('"python": "3', '"python": "2'))
    found = compared(left, other).origin
    assert sorted(found) == ["seed", "versions.python"]
    assert found["seed"] == (3, 4)


def test_common_figures_and_curves_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    left = make(tmp_path / "a", {1: {"loss": 3.0, "lr": 0.1}, 2: {"loss": float("nan")}}, final={"loss": 2.0, "x": 1.0})
    right = make(tmp_path / "b", {1: {"loss": 9.0}}, final={"loss": 2.5, "y": 1.0})
    with (right / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1, "loss": 4.0}\n{"step": 2, "lo')
    both = compared(left, right)
    assert both.curves == {"loss": ({1: 3.0, 2: None}, {1: 4.0})}
    assert both.figures == {"loss": (2.0, 2.5)}
    (chart,) = both.charts()
    assert [line.name for line in chart.lines] == ["left", "right"]


@pytest.mark.parametrize(
    ("left", "right", "sentence"),
    [
        ("abcd", "abcd", "the same bits at all 4 common steps, 0 to 3"),
        ("abcd", "ab", "the same bits at all 2 common steps, 0 to 1"),
        ("abcd", "abxy", "the same bits up to step 1, different at step 2"),
        ("abcd", "abxd", "the same bits up to step 1, different at step 2"),
        ("abcd", "xbcd", "different from the first digest on, different at step 0"),
        ("abcd", "", "no digests to compare (none in {right}); tracking.digest_every=1 logs them"),
        ("", "", "no digests to compare (none in {left} and {right}); tracking.digest_every=1"),
    ],
)
def test_the_first_step_at_which_the_weights_differ(tmp_path: Path, left: str, right: str, sentence: str) -> None:
    folders = make(tmp_path / "a", digests(*left)), make(tmp_path / "b", digests(*right))
    weights = compared(*folders).weights
    assert weights.startswith(sentence.format(left=folders[0], right=folders[1]))
    assert "layouts" not in weights


def test_digests_at_no_common_step(tmp_path: Path) -> None:
    left, right = make(tmp_path / "a", {1: {DIGEST: "a"}}), make(tmp_path / "b", {2: {DIGEST: "b"}})
    assert compared(left, right).weights.startswith("no digests to compare (none at a common step)")


def test_another_layout_explains_other_bits_but_not_equal_ones(tmp_path: Path) -> None:
    left = make(tmp_path / "a", digests("a", "b"))
    right = make(tmp_path / "b", digests("a", "x"), parallel={"shard": "full"})
    assert compared(left, right).weights.endswith(
        "different at step 1 (the layouts differ: parallel.shard; rounding alone explains that)"
    )
    same = make(tmp_path / "c", digests("a", "b"), parallel={"shard": "full"})
    assert compared(left, same).weights == "the same bits at all 2 common steps, 0 to 1"


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere is not a run folder: it has no status.json"):
        read_run(tmp_path / "nowhere")
    folder = make(tmp_path / "a")
    (folder / "config.yaml").write_text("- just\n- a list\n")
    with pytest.raises(UsageError, match=r"config.yaml is not a recipe"):
        read_run(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"is not a run folder: it has no config.yaml"):
        read_run(folder)


def test_steps_are_spread_evenly_with_both_ends() -> None:
    assert spread(range(9), 3) == [0, 4, 8]
    assert spread([4, 1], 6) == [1, 4]
    assert spread(range(9), 1) == [8]
    assert spread([], 3) == []
