"""The process that owns the wandb run: JSON lines on standard input, lines for people on standard output.

    {"init": {...}}  arguments of wandb.init, first      {"metrics": {...}}  one step, any number of times
    {"summary": {...}}  the run reached its end, last; an end of input without it marks the run as failed

A process of its own because wandb waits for its service at interpreter exit without a deadline, and listens to
signals: here neither can reach the training run. It runs as a script and imports nothing but wandb.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

ORPHAN_SECONDS = 60.0
"""How long it may go on when nobody waits for it any more."""
INIT_SECONDS = 30.0


def main() -> None:
    arguments = json.loads(sys.stdin.readline())["init"]
    run = start_run(arguments)
    exit_code = 1
    for line in sys.stdin:
        said = json.loads(line)
        if "metrics" in said:
            run.log(said["metrics"])
        else:
            run.summary.update(said["summary"])
            exit_code = 0
    watchdog = threading.Timer(ORPHAN_SECONDS, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
    run.finish(exit_code=exit_code)


def start_run(arguments: dict[str, Any]) -> Any:
    """Starts the run, offline when the service cannot be reached."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=INIT_SECONDS, disable_git=True, save_code=False, disable_code=True
    )
    try:
        run = wandb.init(settings=settings, **arguments)
    except wandb.Error as error:
        tell(f"wandb cannot be reached, goes on offline: {str(error).splitlines()[0]}")
        wandb.teardown(exit_code=1)
        run = wandb.init(settings=settings, **{**arguments, "mode": "offline"})
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    if run.offline:
        tell(f"wandb: offline; `wandb sync {os.path.dirname(run.dir)}` uploads it")
    elif run.url:
        tell(f"wandb: {run.url}")
    return run


def tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
