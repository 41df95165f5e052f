"""How a rollout worker gets new weights: out of a snapshot, or from a trainer's rank that it has joined.

The first version is in a snapshot, and whatever did not come otherwise. A snapshot names where to join.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlflow.actors.engine_groups import RunningAtUpdate
from rlflow.actors.engine_thread import EngineThread
from rlflow.actors.rollout_engines.engine import CacheAtUpdate, WeightsLost

if TYPE_CHECKING:
    import torch

    from rlflow.actors.rollout_engines.sent_weights import Chunks
    from rlflow.actors.weight_sync import Meeting, WeightSnapshot

LOAD_TIMEOUT_S = 600.0
"""A load of weights that takes longer is an error."""
_JOIN_TIMEOUT_S = 10.0
_MOST_JOINS = 3
"""A worker that was lost so often without being at fault takes snapshots from then on."""


@dataclass(frozen=True, slots=True)
class WeightsTaken:
    """What a worker says of a snapshot."""

    are_here: bool
    """Its engine has that version, or a newer one."""
    said: str = ""
    """What users should know."""


class WeightReceiver:
    """The worker's end of a connection to one of the trainer's ranks, and the thread that listens to it."""

    def __init__(self, meeting: Meeting, device: torch.device, load: Callable[[Chunks, int], Future[None]]) -> None:
        """Joins, and waits for nothing more.

        Args:
            device: The engine's.
            load: Begins to load a version.

        Raises:
            ConnectionError: The rank cannot be reached.
        """
        from rlflow.actors.weight_carriers import Listening, MappedBuffers, device_name
        from rlflow.actors.weight_lines import Line

        try:
            connection = socket.create_connection(meeting.address, timeout=_JOIN_TIMEOUT_S)
        except OSError as error:
            raise ConnectionError(f"the trainer at {meeting.address} cannot be reached: {error}") from error
        self.transport = meeting.transport
        self._line, self._load, self._device = Line(connection), load, device
        self._carrier = MappedBuffers(device) if meeting.transport == "ipc" else Listening(device)
        self._line.say("greeting", token=meeting.token, device=device_name(device))
        self.is_proven = False
        """It has been probed."""
        self.has_loaded = False
        """A whole version came."""
        self.refusal = ""
        """Why the trainer does not send to it, now and later."""
        self.failure = ""
        """What ended it."""
        self._thread = threading.Thread(target=self._listen, name="weights", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._line.close()

    def _listen(self) -> None:
        from rlflow.actors.weight_carriers import Listening, checksum

        try:
            while True:
                message = self._line.hear("group", "probe", "weights", "refused", timeout_s=None)
                match message["kind"]:
                    case "group":
                        assert isinstance(self._carrier, Listening)
                        self._line.say("ready")
                        self._carrier.join(message)
                    case "probe":
                        self._line.say("checksum", value=checksum(self._carrier.take(message)))
                        self.is_proven = True
                    case "weights":
                        self._take(int(message["version"]))
                    case _:
                        self.is_proven, self.refusal = False, message["reason"]
                        return
        # The trainer hears of the end, and has the weights taken to this worker in another way.
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._say_why(error)
        finally:
            self._line.close()
            self._carrier.close()

    def _say_why(self, error: Exception) -> None:
        if not isinstance(error, ConnectionError):
            # There may be nobody to hear it.
            with suppress(ConnectionError):
                self._line.say("error", reason=f"{type(error).__name__}: {error}"[:2000])

    def _take(self, version: int) -> None:
        """Has the engine load a version that comes now."""
        from rlflow.actors.rollout_engines.sent_weights import Chunks

        chunks = self._chunks()
        loaded = self._load(Chunks(chunks), version)
        try:
            loaded.result(LOAD_TIMEOUT_S)
        except FutureTimeoutError as error:
            raise ConnectionError(f"the engine did not load them within {LOAD_TIMEOUT_S:g} s") from error
        for _ in chunks:
            raise ConnectionError(f"the engine has version {version} and did not read it to its end")
        self._line.say("loaded")
        self.has_loaded = True

    def _chunks(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The chunks of the version that comes, up to its end.

        Raises:
            WeightsLost: They stop coming, or are not what was sent.
        """
        from rlflow.actors.weight_carriers import checksum, settle

        while True:
            try:
                # The trainer may wait for another worker meanwhile; that it has gone is heard at once.
                message = self._line.hear("chunk", "end", timeout_s=LOAD_TIMEOUT_S)
                if message["kind"] == "end":
                    return
                data = self._carrier.take(message)
                if "checksum" in message and checksum(data) != message["checksum"]:
                    raise ConnectionError("other bytes came than were sent")
            # Whatever a mapping or a group raises: the trainer is told by the end of the connection.
            except Exception as error:
                raise WeightsLost(f"new weights stopped coming: {error}") from error
            yield _tensors(data, message["tensors"])
            settle(self._device)
            try:
                self._line.say("answer")
            except ConnectionError as error:
                raise WeightsLost(f"the trainer has given up: {error}") from error


def _tensors(data: torch.Tensor, table: list[list[Any]]) -> list[tuple[str, torch.Tensor]]:
    """Views of a chunk: name, dtype, shape and first byte of each."""
    import math

    import torch

    found = []
    for name, dtype_name, shape, start in table:
        dtype = getattr(torch, dtype_name)
        found.append((name, data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)))
    return found


class WeightIntake:
    """All ways of new weights into the engine of one worker."""

    def __init__(self, engine: EngineThread, running: RunningAtUpdate, cache: CacheAtUpdate) -> None:
        """
        Args:
            running: What becomes of completions under way, of weights that come from a trainer's rank.
            cache: And of their keys and values.
        """
        self._engine = engine
        self._running: RunningAtUpdate = running
        self._cache: CacheAtUpdate = cache
        self._receiver: WeightReceiver | None = None
        self._num_joins = 0
        self._said = self._told = ""

    def take(self, snapshot: WeightSnapshot, running: RunningAtUpdate, cache: CacheAtUpdate) -> WeightsTaken:
        """Loads a snapshot between two steps, unless its version is here. Until it has come, the steps go on.

        Raises:
            ConnectionError: The weights do not come.
            ValueError: They are not what was sent, or not for this model.
        """
        from rlflow.actors.weight_sync import receive, tensors_of

        if not snapshot.is_streamed:
            arrays = receive(snapshot)
            loaded = self._engine.load_weights(lambda: tensors_of(snapshot, arrays), snapshot.version, running, cache)
            loaded.result(LOAD_TIMEOUT_S if running != "wait" else None)
        elif self._engine.version < snapshot.version:
            return WeightsTaken(False, self._news())
        if snapshot.meetings:
            self._join(snapshot.meetings)
        return WeightsTaken(True, self._news())

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()

    def _join(self, meetings: tuple[Meeting, ...]) -> None:
        """Joins the trainer's rank on this engine's device, unless that was done or has been refused."""
        from rlflow.actors.weight_carriers import device_name

        before = self._receiver
        if before is not None and (before.is_alive or before.refusal):
            return
        if before is not None and before.has_loaded:
            self._num_joins = 0
        if self._num_joins >= _MOST_JOINS:
            return
        self._num_joins += 1
        device = _engine_device()
        own = device_name(device)
        near = [meeting for meeting in meetings if meeting.transport == "collective" or meeting.device == own]
        if not near:
            self._num_joins = _MOST_JOINS
            devices = ", ".join(meeting.device for meeting in meetings)
            self._said = f"takes new weights out of the object store: its device is {own}, the trainer's {devices}"
            return
        try:
            self._receiver = WeightReceiver(near[0], device, self._load)
        except ConnectionError as error:
            self._said = f"takes new weights out of the object store: {error}"

    def _load(self, chunks: Chunks, version: int) -> Future[None]:
        return self._engine.load_weights(lambda: chunks, version, self._running, self._cache)

    def _news(self) -> str:
        """How weights come, where that has changed since this was last asked."""
        receiver, said = self._receiver, self._said
        if receiver is not None and receiver.refusal:
            said = f"takes new weights out of the object store: the trainer refused it, as {receiver.refusal}"
        elif receiver is not None and receiver.failure:
            said = f"took new weights out of the object store, as they did not come directly: {receiver.failure}"
        elif receiver is not None and receiver.is_proven:
            said = f"takes new weights from the trainer's own memory ({receiver.transport})"
        is_new, self._told = said != self._told, said
        return said if is_new else ""


def _engine_device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
