"""What stands around a worker inside its own process: the log, the runtime, and answers in place of exceptions.

Knows no Ray: `ray_group` makes an actor of it, a test may call it directly.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from framework.cluster.failure import Failure
from framework.core import runtime
from framework.core.signals import current, stop_request

MORE, END = "more", "end"  # the word after each streamed item


class Shell:
    """One rank of a role. `call` and `stream` never raise: they answer a Failure, which keeps where and why."""

    def __init__(self, role: str, rank: int, log: str):
        self.role = role
        self.rank = rank
        self._listening = contextlib.ExitStack()
        _write_to(Path(log))
        print(f"--- {role} rank {rank}, pid {os.getpid()}")  # the log of a continued run goes on below the old one

    def start(
        self,
        address: str | None,
        worker_class: type,
        kwargs: dict[str, Any],
        settle: dict[str, Any],
        prepare: Callable[[], None] | None,
    ) -> tuple[int, int] | Failure:
        """Build the worker. `settle` is for runtime.start; `prepare` runs first. Answers (pid, data rank)."""
        try:
            if prepare is not None:
                prepare()
            place = runtime.start(rank=self.rank, address=address, **settle)
            self.worker = worker_class(runtime=place, **kwargs)
            return os.getpid(), getattr(self.worker, "data_rank", place.rank)
        except Exception as error:
            return self._failure(error, "start")

    def listen(self) -> None:
        """From now on a SIGTERM to this process is a wish that the controller asks for; Ray would end the process."""
        self._listening.enter_context(stop_request())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1])  # the private Ray blocks them

    def asked(self) -> int:
        """The exit code that this process was asked to leave with, 0 while it was not."""
        return current().exit_code

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The worker's answer, or a Failure."""
        try:
            return compact(getattr(self.worker, method)(*args, **kwargs))
        except Exception as error:
            return self._failure(error, method)

    def stream(self, method: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Each item of the worker's generator, followed by MORE; at last None and END, or None and a Failure.

        The caller reads the words and passes the items on unread."""
        try:
            for item in getattr(self.worker, method)(*args, **kwargs):
                yield compact(item)
                yield MORE
        except Exception as error:
            yield None
            yield self._failure(error, method)
        else:
            yield None
            yield END

    def drain(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run the worker's generator for its collectives alone."""
        try:
            for _ in getattr(self.worker, method)(*args, **kwargs):
                pass
        except Exception as error:
            return self._failure(error, method)

    def _failure(self, error: Exception, phase: str) -> Failure:
        traceback.print_exception(error)
        return Failure.of(error, self.role, self.rank, phase)


def compact(value: Any) -> Any:
    """`value` ready to travel: tensors on the CPU, without gradient, and no view that drags its whole storage along."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().cpu()
        return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x

    return pytree.tree_map(leaf, value)


def _write_to(log: Path) -> None:
    """Send this process's output to `log`: Python's, C++'s, and on SIGUSR2 the stacks of all threads."""
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream)
    faulthandler.register(signal.SIGUSR2, stream, all_threads=True)
