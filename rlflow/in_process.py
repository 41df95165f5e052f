"""The actors of a stage as objects of this process: the same groups, calls, results and failures, without Ray.

A whole run takes a second instead of half a minute, for tests and for measurements of the driver. The calls of one
actor run in a thread of its own, in order; of an actor that takes several at a time, in as many threads. Values are
passed as they are, not copied. A call that runs cannot be interrupted: the actor of one that hangs can be killed, and
what the call says later is heard by nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rlflow.actor_groups import CALLS_AT_ONCE, TRAINERS, Actors, Construct, start_actors
from rlflow.actors.actor_group import ActorFailure
from rlflow.recipe import ModelBlock, Recipe
from rlflow.roles import Role, roles

_TORCH = threading.Lock()
"""Who seeds or draws from torch's global generator, or imports a library, does so alone: the same numbers each time."""
_ALONE = (*TRAINERS, "reference", "teacher")
"""Roles whose calls use that generator."""
_ENDED = threading.Condition()
"""Notified whenever a call has ended or an actor has died."""


class ActorDiedError(RuntimeError):
    """What a call was given comes from an actor that died."""


class Result:
    """What a call returned, once it has: in the place of Ray's object reference."""

    def __init__(self) -> None:
        self.has_ended = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.death = ""
        """Why the actor died before it had answered; empty where it had."""

    def settle(self, value: Any = None, *, error: BaseException | None = None, death: str = "") -> None:
        """Ends the call. The first end counts: what a killed actor says later is heard by nobody."""
        with _ENDED:
            if not self.has_ended:
                self.has_ended, self.value, self.error, self.death = True, value, error, death
                _ENDED.notify_all()


class _Call(NamedTuple):
    result: Result
    method: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class LocalActor:
    """An object and the threads in which its calls run."""

    def __init__(
        self, make: Callable[[], Any], calls_at_once: int = 1, turn: AbstractContextManager[Any] | None = None
    ) -> None:
        """Starts the construction and returns at once.

        Args:
            turn: Held during each call.
        """
        self._make, self._turn = make, turn or nullcontext()
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._object: Any = None
        self._death = ""
        self._owed: set[Result] = set()
        self._threads = calls_at_once
        self._start_thread(self._construct)

    def call(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
        result = Result()
        with _ENDED:
            if not self._death:
                self._owed.add(result)
                self._calls.put(_Call(result, method, args, kwargs))
                return result
        result.settle(death=self._death)
        return result

    def die(self, reason: str) -> None:
        """Ends the actor, as the death of its process would: its calls fail, what it has started is closed."""
        with _ENDED:
            if self._death:
                return
            self._death = reason
            owed, made = list(self._owed), self._object
            self._owed.clear()
            self._object = None
        for result in owed:
            result.settle(death=reason)
        for _ in range(self._threads):
            self._calls.put(None)
        if isinstance(made, _Closable):
            made.close()

    def _start_thread(self, work: Callable[[], None]) -> None:
        # Daemons: a call that hangs does not keep the process.
        threading.Thread(target=work, daemon=True).start()

    def _construct(self) -> None:
        try:
            with _TORCH:
                made = self._make()
        except Exception as error:  # an actor that cannot be made is a dead one; its calls tell why
            self.die(f"it could not be started: {type(error).__name__}: {error}")
            return
        with _ENDED:
            is_wanted = not self._death
            if is_wanted:
                self._object = made
        if not is_wanted:
            if isinstance(made, _Closable):
                made.close()
            return
        for _ in range(self._threads - 1):
            self._start_thread(self._serve)
        self._serve()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            self._run(call)

    def _run(self, call: _Call) -> None:
        """Runs a call, once what it was given has come."""
        given = [arg for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, Result)]
        with _ENDED:
            _ENDED.wait_for(lambda: self._death or all(result.has_ended for result in given))
            made = self._object
        if made is None:
            return
        try:
            args = [_value_of(arg) for arg in call.args]
            kwargs = {name: _value_of(arg) for name, arg in call.kwargs.items()}
            with self._turn:
                value = getattr(made, call.method)(*args, **kwargs)
        except SystemExit:
            self.die("the actor died (it ended itself)")
        except Exception as error:  # what a process boundary would be: the caller is told
            call.result.settle(error=error)
        else:
            call.result.settle(value)
        with _ENDED:
            self._owed.discard(call.result)


def _value_of(argument: Any) -> Any:
    """What an actor is given in the place of an argument: a result's value, or its failure raised."""
    if not isinstance(argument, Result):
        return argument
    if argument.death:
        raise ActorDiedError(argument.death)
    if argument.error is not None:
        raise argument.error
    return argument.value


class LocalTransport:
    """Actors in threads of this process. One object serves one group."""

    def __init__(
        self,
        make: Callable[[int], Any],
        calls_at_once: int = 1,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        """
        Args:
            make: The object of a rank.
            calls_at_once: How many calls of one actor run side by side.
            turn: Held during each call: actors that share a lock take turns.
        """
        self._make, self._calls_at_once, self._turn = make, calls_at_once, turn

    def create(self, rank: int) -> LocalActor:
        return LocalActor(partial(self._make, rank), self._calls_at_once, self._turn)

    def kill(self, handle: LocalActor) -> None:
        handle.die("the actor died (it was killed)")

    def leave(self, rank: int) -> None:
        """A place in this process is nothing that was reserved."""

    def call(self, handle: LocalActor, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
        return handle.call(method, args, kwargs)

    def wait(self, refs: Sequence[Result], timeout_s: float) -> tuple[list[Result], list[Result]]:
        with _ENDED:
            _ENDED.wait_for(lambda: any(ref.has_ended for ref in refs), timeout_s)
            return [ref for ref in refs if ref.has_ended], [ref for ref in refs if not ref.has_ended]

    def fetch(self, ref: Result, actor: str, call: str) -> Any:
        assert ref.has_ended, "wait for it first"
        if ref.death:
            raise ActorFailure(actor, call, ref.death, died=True)
        if ref.error is not None:
            raise ActorFailure.raised(actor, call, ref.error) from ref.error
        return ref.value

    def put(self, value: Any) -> Result:
        result = Result()
        result.settle(value)
        return result


def place(recipe: Recipe, model: ModelBlock, directory: Path, max_model_len: int) -> Actors:
    """Starts the actors of a stage in this process, where torch computes in one thread.

    Raises:
        ValueError: A trainer has several ranks, which only processes of their own can be.
    """
    import torch

    for role in roles(recipe):
        if role.name in TRAINERS and role.workers > 1:
            raise ValueError(f"{role.workers} ranks of the {role.name} need processes of their own: start it with Ray")
    torch.set_num_threads(1)

    def transport_for(role: Role, construct: Construct) -> LocalTransport:
        def make(rank: int) -> Any:
            cls, arguments = construct(rank)
            return cls(**arguments)

        turn = _TORCH if role.name in _ALONE else None
        return LocalTransport(make, CALLS_AT_ONCE.get(role.name, 1), turn)

    return start_actors(recipe, model, directory, max_model_len, transport_for)
