"""docs/modify-ppo.md as its reader runs it: the blocks in files outside the repository, the commands on tiny models."""

import contextlib
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from framework.core.registry import KINDS
from framework.main import main
from framework.models.hub import load
from tests.tiny import PPO, command, environment, forked, model_folders

PAGE = (Path(__file__).resolve().parents[1] / "docs/modify-ppo.md").read_text(encoding="utf-8")
_BLOCK = r"```python\n(from framework.*?@register\(\"\w+\", \"(\w+)\"\).*?)```"
BLOCKS = {name: block for block, name in re.findall(_BLOCK, PAGE, re.DOTALL)}
COMMANDS = re.findall(r"^framework .*extensions=.*", PAGE, re.MULTILINE)
SFT = ["device=cpu", "threads=1", "tracking.progress=false", "tracking.every=1", "train.steps=2", "batch.size=2"]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, and models where the page's commands look for them."""
    folder = tmp_path_factory.mktemp("outside")
    for name, block in BLOCKS.items():
        (folder / f"{name}.py").write_text(block, encoding="utf-8")
    policy, reward = model_folders(folder / "drawn")
    for stage, model in (("sft", policy), ("pretrain", policy), ("reward_model", reward)):
        (folder / "runs" / stage).mkdir(parents=True)
        (folder / "runs" / stage / "model").symlink_to(model)
    record = {"q": "白日依山盡，得流字。", "a": "黃河入海流。"}
    (folder / "chats.jsonl").write_text((json.dumps(record) + "\n") * 4)
    return folder


@pytest.fixture
def here(outside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(outside)
    return outside


def words(name: str, *others: str) -> list[str]:
    """The page's command that names the extension `name`, made small, in a run folder of its own."""
    (line,) = [line for line in COMMANDS if re.search(rf"[\[,]{name}\.py", line)]
    return [*(word for word in line.split()[1:] if "prompts.jsonl" not in word), *others, f"name={name}"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def plain(outside: Path) -> Path:
    """The run that the page's are held against: the same words, nothing of one's own."""
    folders = ["init_from=runs/sft/model", "reward_from=runs/reward_model/model", "ppo.whiten_advantages=false"]
    with contextlib.chdir(outside):
        assert main(["ppo", *folders, *PPO, "name=plain"]) == 0
    return outside / "runs/plain"


def test_every_block_is_at_most_ten_lines() -> None:
    assert set(BLOCKS) == {"short", "unrepeated", "above_median", "near", "question", "spoken", "ends"}
    assert {name: n for name, block in BLOCKS.items() if (n := len(block.splitlines())) > 10} == {}


def test_the_page_lists_every_kind() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == sorted(KINDS)


def test_a_rule_is_the_reward_and_needs_no_reward_model(outside: Path) -> None:
    forked(*words("short", *PPO), cwd=outside)
    run = outside / "runs/short"
    shown = lines(run / "samples.jsonl")
    assert len(shown) >= 8
    for sample in shown:
        assert sample["score"] == pytest.approx(-abs(len(sample["response"]) - 10) / 10, abs=1e-4)
    assert lines(run / "metrics.jsonl")[0]["critic/value"] == 0.0, "the critic starts from the policy, its head new"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["extensions"] == {"short.py": hashlib.sha256(BLOCKS["short"].encode()).hexdigest()}
    assert "reward_from" not in summary["parents"]


def test_a_rule_goes_on_from_the_reward_models_score(here: Path, plain: Path) -> None:
    assert main(words("unrepeated", *PPO, "ppo.whiten_advantages=false")) == 0
    pairs = [
        (own, judged)
        for own, judged in zip(lines(here / "runs/unrepeated/samples.jsonl"), lines(plain / "samples.jsonl"))
        if own["step"] == 0
    ]
    assert len(pairs) >= 4
    for own, judged in pairs:
        said_again = len(own["response"]) - len(set(own["response"]))
        assert own["response"] == judged["response"]
        assert own["score"] == pytest.approx(judged["score"] - said_again, abs=2e-4)


def test_an_advantage_of_ones_own(here: Path, plain: Path) -> None:
    assert main(words("above_median", *PPO, "ppo.whiten_advantages=false")) == 0
    own, gae = (json.loads((run / "rollout.json").read_text()) for run in (here / "runs/above_median", plain))
    assert len(set(advantages(own))) == 1, "one for the whole response"
    assert len(set(advantages(gae))) > 1


def advantages(rollout: dict[str, Any]) -> list[float]:
    return [a for a, counts in zip(rollout["advantages"], rollout["response_mask"], strict=True) if counts]


def test_a_loss_term_of_ones_own(here: Path, plain: Path) -> None:
    assert main(words("near", *PPO, "ppo.whiten_advantages=false")) == 0
    run = here / "runs/near"
    assert lines(run / "metrics.jsonl")[-1]["actor/pull"] > 0
    own, without = (dict(load(folder / "model").named_parameters()) for folder in (run, plain))
    assert any((own[name] != without[name]).any() for name in own), "it moves the weights"


def test_a_format_a_tracker_and_a_task_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("question", *SFT, "evaluation.limit=4", "data.max_tokens=32", "sampling.max_tokens=12")) == 0
    printed = capsys.readouterr().out
    assert "chats.jsonl: format question" in printed
    assert "黃河入海流。" in printed
    assert printed.count("the loss was") == 2
    summary = json.loads((here / "runs/question/summary.json").read_text())
    assert 0 <= summary["figures"]["ends"] <= 1
    assert set(summary["extensions"]) == {"question.py", "spoken.py", "ends.py"}


def test_a_breakpoint_in_a_worker_stops_at_the_terminal(outside: Path) -> None:
    """Python's own debugger on a pipe: it shows the response and the worker's method above, and goes on."""
    block = BLOCKS["short"].replace("    return", "    breakpoint()\n    return").replace("short", "stopping")
    (outside / "stopping.py").write_text(block)
    typed = "p 'seen', completion.response\nwhere\nimport sys; sys.breakpointhook = lambda: None\ncontinue\n"
    own = [word.replace("short", "stopping") for word in words("short", *PPO, "ppo.iterations=1")]
    done = subprocess.run(
        command(*own), input=typed, cwd=outside, env=environment(), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "('seen', '" in done.stdout
    assert re.search(r"workers/rule\.py\(\d+\)score\(\)", done.stdout)
    assert re.search(r"stages/ppo\.py\(\d+\)run\(\)", done.stdout)
    assert json.loads((outside / "runs/stopping/status.json").read_text())["state"] == "finished"
