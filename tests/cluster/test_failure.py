"""The first-failure report, without Ray."""

from pathlib import Path

from framework.cluster.failure import Failure, first, late, log_tail, named
from framework.core.errors import DataError, DeadlineError, Interrupted, NonFiniteError, WorkerError


def test_a_dead_process_comes_before_the_exceptions_it_caused() -> None:
    dead = Failure("actor", 2, "update", "its process died")
    peers = [Failure("actor", rank, "update", "Connection closed by peer", None, time=10.0 + rank) for rank in (0, 1)]
    assert first([*peers, dead]) is dead
    assert first(peers[::-1]).rank == 0


def test_where_a_dead_process_stood_is_told_by_its_peers_or_by_whoever_can_be_asked() -> None:
    dead = Failure("actor", 2, "update", "its process died")
    peer = Failure("actor", 0, "update", "rank 2 has left or died; ...", DeadlineError, time=10.0)
    assert first([peer, dead]).cause == "its process died; rank 2 has left or died; ..."
    assert first([dead], lambda: "rank 2 has left").cause == "its process died; rank 2 has left"
    assert first([peer], lambda: "not asked").cause == peer.cause


def test_our_errors_come_back_as_their_class_others_as_worker_errors(tmp_path: Path) -> None:
    log = tmp_path / "actor-1.log"
    log.write_text("".join(f"line {i}\n" for i in range(30)))
    ours = Failure.of(NonFiniteError("loss is nan"), "actor", 1, "update").exception(log)
    assert type(ours) is NonFiniteError
    assert str(ours) == "actor rank 1, update: loss is nan"
    data = Failure.of(DataError("no text", "a.jsonl", 3), "actor", 0, "start").exception(log)
    assert type(data) is DataError
    assert data.exit_code == 2
    other = Failure.of(KeyError("weight"), "actor", 1, "update").exception(log)
    assert type(other) is WorkerError
    assert str(other).startswith("actor rank 1, update failed: KeyError: 'weight'\nlast lines of")
    assert str(other).splitlines()[-1] == "  line 29"
    assert "line 17" not in str(other)


def test_a_stop_keeps_its_exit_code() -> None:
    stopped = named(Interrupted("stopped at once", 143), "reward", 0, "score")
    assert (str(stopped), stopped.exit_code) == ("reward rank 0, score: stopped at once", 143)


def test_a_late_worker_is_named_with_the_key_to_raise(tmp_path: Path) -> None:
    error = late("critic", [1, 3], "values", 30.0, tmp_path / "missing.log")
    assert type(error) is DeadlineError
    assert str(error) == (
        "critic rank 1, 3 did not answer 'values' within 30 s; if the work is this long, raise cluster.deadline_s"
    )
    where = late("critic", [1], "values", 30.0, tmp_path / "missing.log", "rank 1 is at inference")
    assert "within 30 s: rank 1 is at inference; if the work" in str(where)
    assert "cluster.start_deadline_s" in str(late("critic", [0], "start", 5.0, tmp_path / "missing.log"))


def test_an_empty_log_shows_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("")
    assert log_tail(tmp_path / "a.log") == "" == log_tail(tmp_path / "missing.log")
