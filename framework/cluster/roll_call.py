"""The nodes of one job: those that came, what each is told, and what it says.

Both ends of a connection prove that they know the job's token before either reads a word; what travels is JSON. Left
out: what the words mean (`slurm` says them, `node` heeds them).
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from queue import SimpleQueue
from typing import Any

CAME, ASKED, ENDED, LOST = "came", "asked", "ended", "lost"  # what is heard of a node
RUN, SIGNAL, LEAVE = "run", "signal", "leave"  # what a node is told
_QUEUE = 1024  # nodes that may knock at the same instant


@dataclass(frozen=True)
class Said:
    """Example: Said("node2", "ended", {"code": 143}). `node` is empty where this process itself says it."""

    node: str
    what: str
    about: dict[str, Any] = field(default_factory=dict)


class RollCall:
    """The first node's end. Everything that anyone says comes out of `said`, in order."""

    def __init__(self, names: Sequence[str], port: int, token: bytes) -> None:
        self.said: SimpleQueue[Said] = SimpleQueue()
        self._names, self._token = set(names), token
        self._connections: dict[str, Connection] = {}
        # One node alone is spoken to on the loopback interface.
        self._listener = Listener(("127.0.0.1" if len(names) == 1 else "", port), backlog=_QUEUE)
        threading.Thread(target=self._receive, daemon=True).start()

    def tell(self, node: str, what: str, **about: Any) -> None:
        """Say something to a node; one that never came, or is gone, does not hear it."""
        with contextlib.suppress(KeyError, OSError):
            self._connections[node].send_bytes(json.dumps([what, about]).encode())

    def close(self) -> None:
        """Hang up."""
        self._listener.close()
        for connection in self._connections.values():
            connection.close()

    def _receive(self) -> None:
        with contextlib.suppress(OSError):  # of a closed listener
            while True:
                threading.Thread(target=self._listen, args=(self._listener.accept(),), daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        """One node from its first word to its last; a stranger is not heard."""
        try:
            deliver_challenge(connection, self._token)
            answer_challenge(connection, self._token)
            name, about = json.loads(connection.recv_bytes())
        except Exception:
            connection.close()
            return
        if name not in self._names or name in self._connections:
            connection.close()
            return
        self._connections[name] = connection
        self.said.put(Said(name, CAME, about))
        for what, about in heard(connection):
            self.said.put(Said(name, what, about))
        self.said.put(Said(name, LOST))


def call_in(host: str, port: int, token: bytes) -> Connection:
    """A node's end. Raises OSError where nobody answers, AuthenticationError where they know another token."""
    return Client((host, port), authkey=token)


def heard(connection: Connection) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the other end says, until it hangs up."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            yield tuple(json.loads(connection.recv_bytes()))
