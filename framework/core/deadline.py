"""Phases with an end: a rank that waits in vain ends the run in one line that says where every rank stands.

    with deadline("step 3"), deadline("the sum of x"):
        dist.all_reduce(x)   # a peer died: "rank 2 has left or died; its last phase was ...; ranks 0, 1 wait at ..."

Where ranks met in a store, a thread of each tells there twice a second where its process stands. Whoever sees a
collective fail, or its own process stand in one phase for longer than the deadline, asks what all have told and leaves
a verdict in the store: every rank ends with it. Main threads raise it; one that sits in native code cannot, so the
thread ends that process, by what `ending` names. Left out: the limit of a single collective, which is the process
group's (`runtime.start`), and remote calls (`cluster`). torch is imported late: the command line stands by here too.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

from framework.core.errors import DeadlineError
from framework.core.whereabouts import Phases, Post, sentence

if TYPE_CHECKING:
    import torch.distributed as dist

# How gloo and NCCL say that a peer is late or gone. Anything else is our own error and keeps its traceback.
_LATE, _LOST = ("timed out", "timeout"), ("connection closed", "connection reset", "broken pipe", "connection refused")
BEAT_S = 0.5
SILENCE_S = 3.0  # a rank that tells nothing for so long is gone
MARGIN_S = 5.0  # beyond the deadline: a collective that can end by its own limit raises the better error
LINGER_S = 2.0  # with a verdict, for all others to hear it: the store may live in this process
_LEAVE_S = 30.0  # for a main thread that raises the error to end its process
_STORE_S = 10.0
_VERDICT, _JUDGE = "verdict", "judge"

Ending = Callable[[DeadlineError], object]
_here = Phases()
_endings: list[Ending] = []


@contextlib.contextmanager
def deadline(phase: str, patient: bool = False) -> Iterator[None]:
    """Name what this rank is doing. A collective inside that a peer never joined is a DeadlineError which says where
    all ranks stand. A `patient` phase may itself last longer than the deadline: saving, preparing data."""
    entry = _here.enter(phase, patient)
    try:
        yield
    except RuntimeError as error:
        said = str(error).lower()
        is_late = any(symptom in said for symptom in _LATE)
        if _watch is None or not (is_late or any(symptom in said for symptom in _LOST)):
            raise
        _here.freeze()
        raise DeadlineError(_watch.told("waited in vain" if is_late else "a connection was lost")) from error
    finally:
        _here.leave(entry)


@contextlib.contextmanager
def ending(end: Ending) -> Iterator[None]:
    """What else must happen, in this block, before a process ends whose main thread hangs: `end` is called with the
    error, from another thread. Where nobody has named anything, processes are left to whoever calls them."""
    _endings.append(end)
    try:
        yield
    finally:
        _endings.remove(end)


def watch(store: "dist.Store", rank: int, world_size: int, seconds: float) -> None:
    """Begin to tell the others, by way of `store`, where this rank stands, and to hear of a verdict."""
    global _watch
    unwatch()
    _watch = _Watch(store, rank, world_size, seconds)
    _watch.start()


def unwatch() -> None:
    """Tell nothing more."""
    global _watch
    if _watch is not None:
        _watch.leave()
    _watch = None


def ask(host: str, port: int, world_size: int) -> str:
    """The sentence on ranks whose store is at that address, for a process that is none of them; "" where it cannot be
    reached."""
    import torch.distributed as dist

    try:
        socket.create_connection((host, port), timeout=_STORE_S).close()  # refused at once where nobody listens
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_STORE_S))
        return _Watch(store, -1, world_size, 0.0).sentence()
    except (OSError, RuntimeError):
        return ""


class _Watch(threading.Thread):
    """One rank's thread."""

    def __init__(self, store: "dist.Store", rank: int, world_size: int, seconds: float):
        import torch.distributed as dist

        super().__init__(daemon=True, name="whereabouts")
        own = store.clone()  # type: ignore[attr-defined]  # others may wait in theirs
        own.set_timeout(timedelta(seconds=_STORE_S))
        self._store = dist.PrefixStore("whereabouts", own)
        self._rank, self._world_size, self._seconds = rank, world_size, seconds
        self._beat = 0
        self._first: Post | None = None  # of rank 0, with which the store may be gone
        self._lost, self._left = False, threading.Event()
        self._heard = ""  # the verdict
        self._speaks = threading.Lock()  # whoever takes it, this thread or the main one, ends the process
        if rank >= 0:
            self._tell()

    def run(self) -> None:
        while not self._left.wait(BEAT_S):
            if not (self._lost or self._heard):
                try:
                    self._tell()
                    self._verdict()
                except RuntimeError:  # all of the store's own are
                    self._lost = True
            if _here.late(self._seconds + MARGIN_S):
                self._judge("waited in vain")
            if self._heard and _endings:
                self._end(self._heard)

    def leave(self) -> None:
        """The process group is gone, or about to be."""
        self._left.set()

    def told(self, reason: str) -> str:
        """The verdict, for the main thread to raise; it does not return where the process is ended already."""
        verdict = self._judge(reason)
        time.sleep(LINGER_S if self._speaks.acquire(blocking=False) else _LEAVE_S)
        return verdict

    def sentence(self) -> str:
        """What all ranks have told; one whose beat stands still is gone."""
        before = posts = self._posts()
        silent, end = set(posts) - {self._rank}, time.monotonic() + SILENCE_S
        while silent and time.monotonic() < end:
            self._pause()
            posts = self._posts()
            silent = {rank for rank in silent if _beat(posts[rank]) == _beat(before[rank])}
        return sentence(posts, silent)

    def _judge(self, reason: str) -> str:
        """The verdict that is known already, or that of the first who asks; of this rank alone without a store."""
        why = f" ({reason}; cluster.deadline_s={self._seconds:g})"
        if self._lost and not self._heard:
            self._heard = self._alone() + why
        try:
            self._heard = self._known() or self._store.compare_set(_VERDICT, "", self.sentence() + why).decode()
        except RuntimeError:
            self._lost, self._heard = True, self._heard or self._alone() + why
        return self._heard

    def _alone(self) -> str:
        """What this rank knows by itself, where rank 0 and the store have gone."""
        return sentence({0: self._first, self._rank: _here.post()}, {0} - {self._rank})

    def _known(self) -> str:
        """The verdict, waited for where another rank is about to find it."""
        if self._heard:
            return self._heard
        end = time.monotonic() + 2 * SILENCE_S
        if self._store.compare_set(_JUDGE, "", str(self._rank)) != str(self._rank).encode():
            while time.monotonic() < end:
                if verdict := self._verdict():
                    return verdict
                self._pause()
        return self._verdict()

    def _end(self, verdict: str) -> None:
        """End the process, its main thread or not."""
        if self._speaks.acquire(blocking=False):
            error = DeadlineError(verdict)
            ends = [threading.Thread(target=end, args=(error,), daemon=True) for end in _endings]
            for thread in ends:
                thread.start()
            for thread in ends:
                thread.join(_LEAVE_S / 2)
            time.sleep(LINGER_S)
        else:
            time.sleep(_LEAVE_S)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(DeadlineError.exit_code)

    def _pause(self) -> None:
        """Between two looks; whoever waits for others is none of those that are gone."""
        time.sleep(BEAT_S / 2)
        if self._rank >= 0:
            self._tell()

    def _tell(self) -> None:
        self._beat += 1
        self._store.set(str(self._rank), json.dumps(asdict(_here.post(self._beat))))
        if self._rank and self._store.check(["0"]):
            self._first = _read(self._store.get("0"))

    def _posts(self) -> dict[int, Post | None]:
        keys = [str(rank) for rank in range(self._world_size)]
        if self._store.check(keys):
            return {rank: _read(said) for rank, said in enumerate(self._store.multi_get(keys))}
        return {int(key): _read(self._store.get(key)) if self._store.check([key]) else None for key in keys}

    def _verdict(self) -> str:
        if self._store.check([_VERDICT]):
            self._heard = self._store.get(_VERDICT).decode()
        return self._heard


_watch: _Watch | None = None


def _read(said: bytes) -> Post:
    return Post(**json.loads(said))


def _beat(post: Post | None) -> int:
    return 0 if post is None else post.beat
