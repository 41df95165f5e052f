"""ActorGroup: N ranks as one object. Calls are typed, waits are bounded, the first failure names its actor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class ActorFailure(RuntimeError):
    """An actor died, failed or did not answer: which one, in which call, and what it said."""

    def __init__(self, actor: str, call: str, reason: str, *, died: bool = False, refused: bool = False) -> None:
        """
        Args:
            refused: The actor raised a ValueError: what it was given cannot be used.
        """
        super().__init__(f"{actor}.{call}: {reason}")
        self.actor, self.call, self.died, self.refused = actor, call, died, refused


_WAITED_FOR: ContextVar[Pending[Any] | None] = ContextVar("waited_for", default=None)


class Pending(Generic[R]):
    """Results on their way, each with the name of the actor that owes it."""

    def __init__(self, names: Sequence[str], call: str, refs: Sequence[ray.ObjectRef]) -> None:
        self.names, self.call, self.refs = list(names), call, list(refs)
        self.owing = list(names)
        """Those that have not answered yet, once somebody waits."""

    @staticmethod
    def current() -> Pending[Any] | None:
        """What this thread waits for, if anything: for whoever interrupts it."""
        return _WAITED_FOR.get()

    def get(self, timeout_s: float) -> list[R]:
        """Waits for all of them.

        Raises:
            ActorFailure: As soon as one fails, or when the time is up: the others are not waited for.
        """
        name_of = dict(zip(self.refs, self.names, strict=True))
        waiting = list(self.refs)
        deadline = time.monotonic() + timeout_s
        outer = _WAITED_FOR.set(self)
        try:
            while waiting:
                self.owing = [name_of[ref] for ref in waiting]
                done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
                if not done:
                    raise ActorFailure(", ".join(self.owing), self.call, f"no answer within {timeout_s:.0f} s")
                fetch(done[0], name_of[done[0]], self.call)
            return ray.get(self.refs, timeout=60)
        finally:
            _WAITED_FOR.reset(outer)


def fetch(ref: ray.ObjectRef, actor: str, call: str) -> Any:
    """The value of a finished reference; its failure as an ActorFailure."""
    try:
        return ray.get(ref, timeout=60)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        reason = f"{type(cause).__name__}: {cause}"
        raise ActorFailure(actor, call, reason, refused=isinstance(cause, ValueError)) from error
    except RayActorError as error:
        raise ActorFailure(actor, call, f"the actor died ({str(error).splitlines()[0]})", died=True) from error
    except GetTimeoutError as error:
        raise ActorFailure(actor, call, "its result could not be fetched within 60 s") from error


class ActorGroup(Generic[T]):
    """Handles of the actors that run one plain class, in rank order."""

    def __init__(self, name: str, handles: Sequence[Any], timeout_s: float) -> None:
        self.name, self.handles, self.timeout_s = name, list(handles), timeout_s

    def __len__(self) -> int:
        return len(self.handles)

    def name_of(self, rank: int) -> str:
        return f"{self.name}[{rank}]"

    def start(self, rank: int, method: Callable[Concatenate[T, P], R], *args: Any, **kwargs: Any) -> ray.ObjectRef:
        """Calls ``method`` on one actor and returns at once. Arguments may be object references."""
        return getattr(self.handles[rank], method.__name__).remote(*args, **kwargs)

    def get(self, rank: int, method: Callable[Concatenate[T, P], R], ref: ray.ObjectRef) -> R:
        """Waits for what ``start`` returned."""
        return Pending[R]([self.name_of(rank)], method.__name__, [ref]).get(self.timeout_s)[0]

    def start_all(self, method: Callable[Concatenate[T, P], R], *args: Any, **kwargs: Any) -> Pending[R]:
        """The same call on every actor."""
        refs = [self.start(rank, method, *args, **kwargs) for rank in range(len(self))]
        return Pending([self.name_of(rank) for rank in range(len(self))], method.__name__, refs)

    def call_all(self, method: Callable[Concatenate[T, P], R], *args: Any, **kwargs: Any) -> list[R]:
        """The same call on every actor; results in rank order."""
        return self.start_all(method, *args, **kwargs).get(self.timeout_s)

    def call_each(
        self, method: Callable[Concatenate[T, P], R], per_rank: Sequence[Any], *args: Any, **kwargs: Any
    ) -> list[R]:
        """``method(per_rank[rank], *args)`` on every actor; results in rank order."""
        return self.start_each(method, per_rank, *args, **kwargs).get(self.timeout_s)

    def start_each(
        self, method: Callable[Concatenate[T, P], R], per_rank: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Pending[R]:
        """``call_each`` without waiting."""
        assert len(per_rank) == len(self)
        refs = [self.start(rank, method, item, *args, **kwargs) for rank, item in enumerate(per_rank)]
        return Pending([self.name_of(rank) for rank in range(len(self))], method.__name__, refs)

    def kill(self) -> None:
        for handle in self.handles:
            ray.kill(handle)
