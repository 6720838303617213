"""Groups: the workers of one role, called as if they were one object. Here: Pending, Stream, and the group of one
worker in this process. The group of Ray actors stands in `ray_group`; the caller cannot tell them apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from framework.cluster.failure import named
from framework.cluster.marks import Answer, Call, Layout, Mark, join, mark_of, share_out
from framework.core.errors import FrameworkError

T = TypeVar("T")
Pause = Callable[[], None]


class Pending(Generic[T]):
    """The answer of a call that may still be under way. `reference`, where there is one, lets another group have the
    answer without its passing through this process."""

    def __init__(self, wait: Callable[[Pause | None], T], reference: Any = None):
        self._wait: Callable[[Pause | None], T] | None = wait
        self._value: T | None = None
        self.reference = reference

    def result(self, pause: Pause | None = None) -> T:
        """Wait for the answer, at most the cluster's deadline; a failed worker's error is raised here. `pause` is
        called now and then while waiting, and may raise."""
        if self._wait is not None:
            self._value = self._wait(pause)
            self._wait = None
        return self._value  # type: ignore[return-value]

    @classmethod
    def done(cls, value: T) -> Pending[T]:
        """An answer that is already here."""
        return cls(lambda _: value)


Stream = Iterator[Pending[T]]


class Group(ABC):
    """The workers of one role. Every marked method of the worker class can be called on the group and answers a Pending
    (a Stream where the mark says so)."""

    def __init__(self, role: str, worker_class: type):
        self.role = role
        self.worker_class = worker_class

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        mark = mark_of(self.worker_class, name)
        return lambda *args, **kwargs: self._call(name, mark, (args, kwargs))

    @abstractmethod
    def ready(self) -> None:
        """Wait until all workers have come up."""

    @abstractmethod
    def asked(self) -> Pending[int]:
        """The exit code of a worker whose own process was asked to stop, 0 where none was."""

    @abstractmethod
    def _call(self, name: str, mark: Mark, call: Call) -> Any: ...


class LocalGroup(Group):
    """One worker in this process, called directly: a breakpoint in it works, an error keeps its traceback. A Pending is
    done before it is returned, so there is no deadline."""

    def __init__(self, role: str, worker_class: type, kwargs: dict[str, Any]):
        super().__init__(role, worker_class)
        self._worker = worker_class(**kwargs)

    def ready(self) -> None:
        """It came up when it was built."""

    def asked(self) -> Pending[int]:
        """Its process is this one, which knows."""
        return Pending.done(0)

    def _call(self, name: str, mark: Mark, call: Call) -> Any:
        layout = Layout((0,))
        (args, kwargs), rows = _one(share_out(mark, resolved(call), layout))
        try:
            answer = getattr(self._worker, name)(*args, **kwargs)
        except FrameworkError as error:
            raise named(error, self.role, 0, name) from error
        if mark.answer is Answer.STREAM:
            return (Pending.done(item) for item in answer)
        return Pending.done(join(mark, [answer], layout, rows))


def resolved(call: Call, keep_references: bool = False) -> Call:
    """`call` with every Pending argument replaced by its value, or by its reference where that is kept and exists."""

    def value(argument: Any) -> Any:
        if not isinstance(argument, Pending):
            return argument
        return argument.reference if keep_references and argument.reference is not None else argument.result()

    args, kwargs = call
    return tuple(value(a) for a in args), {name: value(a) for name, a in kwargs.items()}


def _one(shared: tuple[list[Call], int]) -> tuple[Call, int]:
    (call,), rows = shared
    return call, rows
