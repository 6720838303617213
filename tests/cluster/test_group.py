"""The group of one worker in this process."""

from collections.abc import Iterator

import pytest
import torch
from stand_in import StandIn, prompts

from framework.cluster.group import LocalGroup, Pending
from framework.core.errors import DataError, NonFiniteError
from framework.core.runtime import Runtime


@pytest.fixture
def group() -> LocalGroup:
    return LocalGroup("actor", StandIn, {"runtime": Runtime()})


def test_calls_answer_pendings_that_are_done(group: LocalGroup) -> None:
    pending = group.squares(prompts(3), add=1)
    assert isinstance(pending, Pending)
    assert torch.equal(pending.result(), prompts(3).tokens ** 2 + 1)
    assert pending.result() is pending.result()
    assert len(group.answers(prompts(2), samples=3).result()) == 6
    assert group.echo(7).result() == (0, 7)
    assert [fact["rank"] for fact in group.facts().result()] == [0]


def test_a_pending_is_waited_for_once() -> None:
    calls: list[int] = []
    pending = Pending(lambda _: calls.append(1) or len(calls))
    assert (pending.result(), pending.result(), calls) == (1, 1, [1])


def test_a_pending_argument_arrives_as_its_value(group: LocalGroup) -> None:
    assert group.echo(Pending.done(9)).result() == (0, 9)
    for item in group.items(3):
        group.hold(item)
    assert group.sum_held().result() == 4 * (0 + 1 + 2)


def test_streams_are_lazy(group: LocalGroup) -> None:
    stream = group.items(3, fail_after=1)
    assert isinstance(stream, Iterator)
    assert next(stream).result().tolist() == [0, 0, 0, 0]
    with pytest.raises(NonFiniteError, match="item 1 is NaN"):
        next(stream)


def test_our_errors_name_role_rank_and_method(group: LocalGroup) -> None:
    with pytest.raises(NonFiniteError, match=r"^actor rank 0, fail: the gradient is NaN$"):
        group.fail(0, "non_finite")
    with pytest.raises(DataError, match=r"^actor rank 0, fail: corpus.jsonl:7: no field 'text'$"):
        group.fail(0, "data")


def test_other_errors_keep_their_traceback(group: LocalGroup) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        group.fail(0, "ours")
    assert caught.traceback[-1].name == "_fail"


def test_unmarked_methods_cannot_be_called(group: LocalGroup) -> None:
    with pytest.raises(AttributeError, match="carries no mark"):
        group.unmarked()
    with pytest.raises(TypeError, match="must answer a Tensor or a Record"):
        group.wrong_answer(prompts(2))
