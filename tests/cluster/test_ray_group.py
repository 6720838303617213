"""Groups of Ray actors: the same answers as in process, and no failure that hangs or goes unnamed. One Ray for all."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import StandIn, prompts

from framework.cluster.config import ClusterConfig, ClusterKind
from framework.cluster.group import Group, LocalGroup
from framework.cluster.session import Cluster, open_cluster
from framework.core.errors import DeadlineError, NonFiniteError, UsageError, WorkerError
from framework.core.runtime import Runtime

WORLDS = {"quad": 4, "single": 1, "victim": 2}
CONFIG = ClusterConfig(kind=ClusterKind.RAY, deadline_s=60.0, colocate=True)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "logs"


@pytest.fixture(scope="module")
def cluster(logs: Path) -> Iterator[Cluster]:
    with open_cluster(CONFIG, WORLDS, logs=logs, device="cpu", prepare=_prepare) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def quad(cluster: Cluster) -> Group:
    """Four ranks: two data ranks of two peers."""
    return cluster.group("quad", StandIn, peers=2)


@pytest.fixture(scope="module")
def single(cluster: Cluster) -> Group:
    return cluster.group("single", StandIn)


@pytest.fixture
def victim(cluster: Cluster) -> Iterator[Any]:
    """Two ranks to be spent in one test."""
    group = cluster.group("victim", StandIn)
    yield group
    group.close()


def _prepare() -> None:
    os.environ["PREPARED"] = "yes"
    print("prepared")


def test_it_is_known_who_stands_where_before_anyone_comes_up(cluster: Cluster) -> None:
    ((roles, nodes),) = cluster.standing().items()
    assert roles == "quad, single, victim"
    ((node, devices),) = nodes.items()
    assert node.startswith(f"{socket.gethostname()} (")
    assert devices == dict.fromkeys(range(4), "cpu")


def test_answers_equal_those_in_process(quad: Group, single: Group) -> None:
    local = LocalGroup("local", StandIn, {"runtime": Runtime()})
    for rows in (1, 4, 7):
        batch = prompts(rows).select(slice(0, rows))
        for group in (quad, single):
            assert torch.equal(group.squares(batch, add=2).result(), local.squares(batch, add=2).result())
            answers, expected = group.answers(batch, 3).result(), local.answers(batch, 3).result()
            assert torch.equal(answers.row, expected.row)
            assert torch.equal(answers.tokens, expected.tokens)
    assert quad.total(prompts(4)).result() == local.total(prompts(4)).result() == sum(range(12))
    assert quad.echo("x").result() == local.echo("x").result()


def test_peers_share_rows_and_the_first_of_them_answers(quad: Group) -> None:
    assert quad.seen(prompts(6)).result().tolist() == [0, 0, 0, 2, 2, 2]
    with pytest.raises(UsageError, match="cannot be split evenly"):
        quad.total(prompts(3))


def test_workers_are_processes_of_their_own_with_the_recipe_s_threads(quad: Group, logs: Path) -> None:
    facts = quad.facts().result()
    assert [fact["rank"] for fact in facts] == [0, 1, 2, 3]
    assert {(fact["world"], fact["threads"], fact["deterministic"]) for fact in facts} == {(4, 1, True)}
    assert len({fact["pid"] for fact in facts} | {os.getpid()}) == 5
    log = (logs / "quad-3.log").read_text()
    assert log == f"--- quad rank 3, pid {facts[3]['pid']}\nprepared\n"


def test_streams_pass_items_from_group_to_group(quad: Group, single: Group) -> None:
    holds = []
    for item in quad.items(20):
        assert item.reference is not None
        holds.append(single.hold(item))
    assert [hold.result() for hold in holds] == list(range(1, 21))
    assert single.sum_held().result() == 4 * 4 * sum(range(20))  # four elements, summed over four ranks
    assert [item.result().tolist() for item in quad.items(2)] == [[0.0] * 4, [4.0] * 4]


def test_a_killed_worker_is_named_although_its_peer_fails_too(victim: Group) -> None:
    pid = victim.facts().result()[1]["pid"]
    with pytest.raises(WorkerError) as caught:
        victim.fail(1, "kill").result()
    message = str(caught.value)
    assert message.startswith(f"victim rank 1, fail failed: its process (pid {pid}) died: killed from outside")
    assert "; rank 1 has left or died; its last phase was " in message
    assert "victim-1.log" in message
    assert message.endswith("\n  the last words of this worker")
    with pytest.raises(WorkerError, match="victim rank 1, fail failed"):
        victim.echo(1)


def test_our_errors_travel_with_role_and_rank_even_in_a_stream(victim: Group) -> None:
    with pytest.raises(NonFiniteError, match=r"^victim rank [01], items: item 2 is NaN$"):
        list(victim.items(5, fail_after=2))


def test_a_worker_that_cannot_start_is_named_with_its_traceback(cluster: Cluster) -> None:
    group = cluster.group("victim", StandIn, fail_at_start=1)
    with pytest.raises(WorkerError) as caught:
        group.squares(prompts(2))
    assert str(caught.value).startswith("victim rank 1, start failed: ValueError: no such weights\nlast lines of")
    assert "in __init__" in str(caught.value)


# The last two spend the groups that the tests above share.


def test_a_deadline_names_the_late_ranks_and_shows_their_stacks(quad: Any) -> None:
    quad._config = replace(CONFIG, deadline_s=1.0)
    with pytest.raises(DeadlineError) as caught:
        quad.fail(1, "hang").result()
    message = str(caught.value)
    assert message.startswith("quad rank 0, 1, 2, 3 did not answer 'fail' within 1 s: rank 1 is at the beginning (")
    assert "in _fail) for " in message
    assert "; ranks 0, 2-3 wait at the beginning; if the work is this long" in message
    assert "quad-0.log" in message
    assert "all_reduce" in message


def test_a_worker_that_dies_in_a_stream_is_noticed(single: Group) -> None:
    with pytest.raises(WorkerError, match=r"single rank 0, items failed: its process \(pid \d+\) died"):
        list(single.items(5, die_after=1))
