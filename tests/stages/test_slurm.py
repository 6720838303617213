"""Which stage runs how on a job's nodes."""

from functools import partial

import pytest

from framework.cluster.slurm import control, lead, train
from framework.core.errors import UsageError
from framework.main import compose
from framework.stages import slurm as room

SFT = ["sft", "init_from=base", "data.train=[a.jsonl]"]
PPO = ["ppo", "init_from=base", "reward_from=judge", "data.train=[a.jsonl]"]


@pytest.mark.parametrize(
    ("words", "work"),
    [
        (SFT, (train, "auto")),
        ([*SFT, "cluster.workers=2"], (train, 2)),
        ([*SFT, "device=cpu"], (train, 1)),
        ([*SFT, "parallel=single"], (train, 1)),
        (PPO, (control, "cluster", 180.0)),
        ([*PPO, "cluster=ray", "cluster.start_deadline_s=9"], (control, "cluster", 9.0)),
        ([*PPO, "cluster=in_process"], (lead,)),
        ([*PPO, "cluster=ray", "cluster.address=head:6379"], (lead,)),
        (["pipeline", "experiment=quickstart"], (control, "ppo.cluster", 180.0)),
        (["pipeline", "experiment=quickstart", "stages=[quickstart/tokenizer,quickstart/pretrain]"], (lead,)),
        (["tokenizer", "data.train=[a.txt]"], (lead,)),
    ],
)  # fmt: skip
def test_how_a_stage_runs_on_the_nodes_of_a_job(words: list[str], work: tuple[object, ...]) -> None:
    found = room._work(words, compose(words[0], words[1:]))
    assert isinstance(found, partial)
    assert (found.func, *found.args) == (work[0], words, *work[1:])


def test_doctor_runs_on_every_rank_and_the_longest_deadline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, float]] = []
    monkeypatch.setattr(room, "run_job", lambda work, deadline_s: asked.append((work.args, deadline_s)) or 0)
    assert room.slurm(["doctor"], compose) == 0
    assert room.slurm(["pipeline", "experiment=quickstart", "ppo.cluster.start_deadline_s=400"], compose) == 0
    assert asked[0] == ((["doctor"], "auto"), 180.0)
    assert asked[1][1] == 400.0


def test_without_words_it_says_how_to_submit() -> None:
    with pytest.raises(UsageError, match="slurm takes a stage and its words: sbatch launch/slurm pretrain"):
        room.slurm([], compose)
