"""How a run ends when it does not end well."""

from __future__ import annotations

GO_ON = "go on with --resume"
"""Ends what a run says that was stopped with a checkpoint; also read by whoever follows the log of a job."""


class RunError(RuntimeError):
    """The run failed for a reason that one message explains: no traceback is shown for it."""


class StopRequested(RunError):
    """Somebody asked the run to stop, and there is a checkpoint: it goes on with ``--resume``."""


class StoppedUnsaved(RunError):
    """Somebody asked the run to stop before anything was saved: it starts anew."""
