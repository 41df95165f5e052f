"""ActorGroup: the actors that run one class, as one object. Calls are typed, waits are bounded, failures are named.

    start, start_all, start_each   return at once, with references
    get, call_all, call_each       wait for all; the first failure names its actor
    wait, result                   wait for whichever ends first, and never for the others
    replace, add, remove           a fresh actor in the place of another, one more, one less

Where the actors live is the business of a `Transport`: Ray's processes (rlflow.placement) or threads of this one
(rlflow.in_process).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

Reference: TypeAlias = Any
"""The result of a call, there or on its way, as the transport stands for it: hashable, and usable as an argument."""
Span: TypeAlias = Callable[[str, str, float, float], None]
"""Takes an actor's name, what it did, and from when until when, in seconds since 1970."""
Handle: TypeAlias = Any
"""One actor, as the transport stands for it."""


class Transport(Protocol):
    """Where the actors of a group live, and how calls reach them."""

    def create(self, rank: int) -> Handle:
        """Starts an actor and returns at once: in the place of that rank, if it has one, or else in a new place."""
        ...

    def kill(self, handle: Handle) -> None:
        """Ends an actor, whatever it does. Its calls fail at once, those to come as well. Safe to call twice."""
        ...

    def leave(self, rank: int) -> None:
        """Gives the place of a rank back."""
        ...

    def call(self, handle: Handle, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reference:
        """Calls an actor and returns at once. References among the arguments stand for their values."""
        ...

    def wait(self, refs: Sequence[Reference], timeout_s: float) -> tuple[list[Reference], list[Reference]]:
        """Waits until one has ended. Returns all that have, and the others; none have when the time is up."""
        ...

    def fetch(self, ref: Reference, actor: str, call: str) -> Any:
        """Returns the value of a reference that has ended; raises its failure as an ActorFailure."""
        ...

    def put(self, value: Any) -> Reference:
        """Keeps a value where every actor can read it."""
        ...


class ActorFailure(RuntimeError):
    """An actor died, failed or did not answer: which one, in which call, and what it said."""

    def __init__(self, actor: str, call: str, reason: str, *, died: bool = False, refused: bool = False) -> None:
        """
        Args:
            died: The actor is gone, and no call will reach it.
            refused: The actor raised a ValueError: what it was given cannot be used.
        """
        super().__init__(f"{actor}.{call}: {reason}")
        self.actor, self.call, self.reason, self.died, self.refused = actor, call, reason, died, refused

    @classmethod
    def raised(cls, actor: str, call: str, cause: BaseException) -> ActorFailure:
        """The failure of a call that raised ``cause`` in an actor that lives on."""
        return cls(actor, call, f"{type(cause).__name__}: {cause}", refused=isinstance(cause, ValueError))


_WAITED_FOR: ContextVar[Pending[Any] | None] = ContextVar("waited_for", default=None)


class Pending(Generic[R]):
    """Results on their way, each with the name of the actor that owes it."""

    def __init__(
        self,
        names: Sequence[str],
        call: str,
        refs: Sequence[Reference],
        transport: Transport,
        span: Span | None = None,
    ) -> None:
        """
        Args:
            span: Called with who answered, which call, and from when until when that took.
        """
        self.names, self.call, self.refs, self.transport = list(names), call, list(refs), transport
        self._span, self._began = span, time.time()
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
        values: dict[Reference, R] = {}
        waiting = list(self.refs)
        deadline = time.monotonic() + timeout_s
        outer = _WAITED_FOR.set(self)
        try:
            while waiting:
                self.owing = [name_of[ref] for ref in waiting]
                done, waiting = self.transport.wait(waiting, max(0.0, deadline - time.monotonic()))
                if not done:
                    raise ActorFailure(", ".join(self.owing), self.call, f"no answer within {timeout_s:.0f} s")
                values |= {ref: self.transport.fetch(ref, name_of[ref], self.call) for ref in done}
                if self._span is not None:
                    for ref in done:
                        self._span(name_of[ref], self.call, self._began, time.time())
            return [values[ref] for ref in self.refs]
        finally:
            _WAITED_FOR.reset(outer)


class ActorGroup(Generic[T]):
    """The actors that run one plain class. Each has a rank, which stays its own while others join and leave."""

    def __init__(self, name: str, transport: Transport, size: int, timeout_s: float) -> None:
        """Starts ``size`` actors, all of them or none, and waits for nothing.

        Args:
            timeout_s: How long the calls that wait for all actors do so.
        """
        self.name, self.transport, self.timeout_s = name, transport, timeout_s
        self.span: Span | None = None
        """Told of every call that somebody waits for; see `Pending`."""
        self.handles: dict[int, Handle] = {}
        """Rank -> actor, in the order of the ranks."""
        self._next_rank = 0
        try:
            for _ in range(size):
                self.add()
        except BaseException:
            self.kill()
            raise

    def __len__(self) -> int:
        return len(self.handles)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those who are in the group, from the lowest up: 0, 1, 2, ... until one is removed."""
        return tuple(self.handles)

    def name_of(self, rank: int) -> str:
        return f"{self.name}[{rank}]"

    def start(self, rank: int, method: Callable[Concatenate[T, P], R], *args: Any, **kwargs: Any) -> Reference:
        """Calls ``method`` on one actor and returns at once. Arguments may be references."""
        return self.transport.call(self.handles[rank], method.__name__, args, kwargs)

    def get(self, rank: int, method: Callable[Concatenate[T, P], R], ref: Reference) -> R:
        """Waits for what ``start`` returned."""
        return Pending[R]([self.name_of(rank)], method.__name__, [ref], self.transport, self.span).get(self.timeout_s)[
            0
        ]

    def start_all(self, method: Callable[Concatenate[T, P], R], *args: Any, **kwargs: Any) -> Pending[R]:
        """The same call on every actor."""
        return self._pending(method, [self.start(rank, method, *args, **kwargs) for rank in self.ranks])

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
        refs = [
            self.start(rank, method, item, *args, **kwargs) for rank, item in zip(self.ranks, per_rank, strict=True)
        ]
        return self._pending(method, refs)

    def wait(self, refs: Sequence[Reference], timeout_s: float) -> tuple[list[Reference], list[Reference]]:
        """Waits until one of several calls has ended, in whatever way: what a call raised is `result`'s to say.

        Args:
            refs: What ``start`` returned, none twice; also of other groups of the same transport.

        Returns:
            All that have ended, and those that have not. None have when the time is up.
        """
        return self.transport.wait(refs, timeout_s)

    def result(self, rank: int, method: Callable[Concatenate[T, P], R], ref: Reference) -> R:
        """The value of a call that has ended.

        Raises:
            ActorFailure: The call failed, or its actor died before it had answered.
        """
        return self.transport.fetch(ref, self.name_of(rank), method.__name__)

    def find_dead(self, method: Callable[[T], Any], timeout_s: float) -> ActorFailure | None:
        """The death of one of its actors, if one is gone: of those that are busy for longer than that, nothing shows.

        Args:
            method: A call that costs nothing.
        """
        rank_of = {self.start(rank, method): rank for rank in self.ranks}
        waiting, deadline = list(rank_of), time.monotonic() + timeout_s
        while waiting and time.monotonic() < deadline:
            done, waiting = self.wait(waiting, max(0.0, deadline - time.monotonic()))
            for ref in done:
                try:
                    self.result(rank_of[ref], method, ref)
                except ActorFailure as failure:
                    if failure.died:
                        return failure
        return None

    def put(self, value: Any) -> Reference:
        """Keeps a value once for all the actors that it is given to."""
        return self.transport.put(value)

    def replace(self, rank: int) -> None:
        """Ends an actor, whatever it does, and starts a fresh one from the same arguments in the same place.

        Returns at once: whether the fresh one has come up, its first call tells. Calls that the old one had not
        answered fail, as those of an actor that died.
        """
        self.transport.kill(self.handles[rank])
        self.handles[rank] = self.transport.create(rank)

    def add(self) -> int:
        """Starts one more actor and returns its rank at once; no rank is given twice."""
        rank = self._next_rank
        self.handles[rank] = self.transport.create(rank)
        self._next_rank += 1
        return rank

    def remove(self, rank: int) -> None:
        """Ends an actor for good and gives its place back."""
        self.transport.kill(self.handles.pop(rank))
        self.transport.leave(rank)

    def kill(self) -> None:
        """Ends all actors and gives their places back. They stay in the group as dead ones."""
        for rank, handle in self.handles.items():
            self.transport.kill(handle)
            self.transport.leave(rank)

    def _pending(self, method: Callable[Concatenate[T, P], R], refs: Sequence[Reference]) -> Pending[R]:
        return Pending([self.name_of(rank) for rank in self.ranks], method.__name__, refs, self.transport, self.span)
