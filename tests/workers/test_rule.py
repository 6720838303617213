"""Rules as rewards: what a function sees of a rollout, the reward model's score in it, and tasks as judges."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import PLACE, spec

from framework.core.errors import DataError, FrameworkError, UsageError
from framework.core.records import Completion, Message, Rollout
from framework.core.registry import forget, register
from framework.tasks.task import Task
from framework.tokenization.load import load as load_tokenizer
from framework.workers.reward import Reward
from framework.workers.rule import Rule, find_reward
from tests.tiny import model_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return model_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    forget(__name__)


def rollout(folder: str, *said: tuple[str, str, bool]) -> Rollout:
    """Prompts and responses as ids, with the end token behind the finished ones."""
    tokenizer = load_tokenizer(folder)
    width = 48
    tokens, token_mask = (
        torch.zeros(len(said), width, dtype=torch.int64),
        torch.zeros(len(said), width, dtype=torch.bool),
    )
    response_mask = token_mask.clone()
    for b, (prompt, response, finished) in enumerate(said):
        asked = tokenizer.encode(tokenizer.render([Message("user", prompt)], generation_prompt=True))
        ids = [*asked, *tokenizer.encode(response), *([tokenizer.end_id] if finished else [])]
        tokens[b, : len(ids)] = torch.tensor(ids)
        token_mask[b, : len(ids)] = True
        response_mask[b, len(asked) : len(ids)] = True
    ones = torch.arange(len(said))
    return Rollout(
        tokens, token_mask, response_mask, torch.arange(width) * token_mask, torch.zeros(len(said), width),
        torch.zeros_like(tokens), torch.tensor([finished for *_, finished in said]), ones, ones,
    )  # fmt: skip


SAID = [("白日依山盡，得流字。", "黃河入海流。", True), ("白日依山盡，得樓字。", "黃河入海流", False)]


def test_a_function_sees_text_and_the_reward_models_score(folders: tuple[str, str]) -> None:
    seen: list[Completion] = []

    @register("reward", "watching")
    def watching(completion: Completion) -> float:
        seen.append(completion)
        return float(len(completion.response))

    rows = rollout(folders[0], *SAID)
    alone = Rule(PLACE, "watching", folders[0], None)
    assert alone.score(rows).tolist() == [6.0, 5.0]
    assert seen == [Completion(*said, score=None) for said in SAID]
    assert (alone.data_rank, alone.data_size) == (0, 1)

    seen.clear()
    frozen = spec(folders[1], optim=None, temperature=1.0)
    Rule(PLACE, "watching", folders[0], frozen).score(rows)
    assert [completion.score for completion in seen] == Reward(PLACE, frozen).score(rows).tolist()


def test_the_answers_of_the_prompt_files_stand_beside(folders: tuple[str, str], tmp_path: Path) -> None:
    @register("reward", "right")
    def right(completion: Completion) -> float:
        return -1.0 if completion.reference is None else float(completion.reference == completion.response)

    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": SAID[0][0], "answer": "黃河入海流。"}, {"prompt": SAID[1][0], "answer": "更上一層樓。"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, records[0], {"prompt": "三"}]))
    rows = rollout(folders[0], *SAID, ("三", "四", True), ("五", "六", True))
    assert Rule(PLACE, "right", folders[0], None, [str(file)]).score(rows).tolist() == [1.0, 0.0, -1.0, -1.0]

    with file.open("a") as stream:
        stream.write(json.dumps(records[0] | {"answer": "another"}) + "\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl:5: the prompt '.*' has two answers, .* and 'another'"):
        Rule(PLACE, "right", folders[0], None, [str(file)])


def test_a_rule_that_only_repeats_the_score_is_the_reward_model(folders: tuple[str, str]) -> None:
    frozen = spec(folders[1], optim=None, temperature=1.0)
    rows = rollout(folders[0], *SAID)
    assert torch.equal(Rule(PLACE, "model", folders[0], frozen).score(rows), Reward(PLACE, frozen).score(rows))


def test_a_task_is_one_truth(folders: tuple[str, str]) -> None:
    """Ours recalls from any prompt what is asked; one that cannot knows its own examples, and says so of others."""
    rows = rollout(folders[0], *SAID, ("白日依山盡，得樓字。", "更上一層樓。", True))
    assert Rule(PLACE, "assigned_rhyme", folders[0], None).score(rows).tolist() == [1.0, 0.0, 1.0]

    @register("task", "known")
    def known() -> Task[str]:
        return Task(
            "known", lambda part: [part], lambda e: (Message("user", e),), str.strip, lambda e, a: float(e in a)
        )

    judge = Rule(PLACE, "known", folders[0], None)
    assert judge.score(rollout(folders[0], ("train", "a train", True), ("test", "a train", True))).tolist() == [
        1.0,
        0.0,
    ]
    with pytest.raises(UsageError, match=r"ppo\.reward=known: the prompt '白日依山盡，得流字。' is none of the task's"):
        judge.score(rows)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "good"])
def test_what_is_no_number_is_refused(folders: tuple[str, str], value: object) -> None:
    register("reward", "odd")(type("Odd", (), {"__call__": lambda *_: value, "__module__": __name__})())
    with pytest.raises(FrameworkError, match=f"ppo.reward=odd gave {value!r} for the response '黃河入海流。'; it must"):
        Rule(PLACE, "odd", folders[0], None).score(rollout(folders[0], *SAID))


def test_an_unknown_name_is_answered_with_the_nearest_reward_or_task() -> None:
    with pytest.raises(UsageError, match=r"unknown reward 'assigned_rime': did you mean 'assigned_rhyme'\?"):
        find_reward("assigned_rime")
