"""What a run looks like from outside, without training: ``fake_rlflow.py run RECIPE key=value ... [--resume]``.

It takes the directory that run.output_dir names, logs a step every 20 ms, and stops as runs do.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from rlflow.driver.errors import StopRequested
from rlflow.driver.outcome import recording_outcome
from rlflow.driver.run_lock import RunLock
from rlflow.recipe import dump_recipe, load_recipe

recipe_path, *overrides = [argument for argument in sys.argv[2:] if argument != "--resume"]
(recipe,) = load_recipe(recipe_path, overrides)
directory = Path(recipe.run.output_dir)
metrics, saved = directory / "metrics.jsonl", directory / "checkpoints"
stopping: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
lock = RunLock(directory)
lock.take()
print("fake run:", *sys.argv[1:], flush=True)
try:
    with recording_outcome(directory):
        (directory / "logs").mkdir(exist_ok=True)
        (directory / "recipe.yaml").write_text(dump_recipe(recipe))
        done = len(metrics.read_text().splitlines()) if "--resume" in sys.argv else 0
        for step in range(done + 1, (recipe.run.steps or 0) + 1):
            time.sleep(0.02)
            row = {"step": step, "time": time.time(), "reward/mean": step / 100, "time/step_s": 0.02}
            with metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
            with (directory / "logs" / "run.log").open("a") as file:
                file.write(f"step {step} <b>done</b>\n")
            if stopping:
                (saved / f"step_{step:06d}").mkdir(parents=True)
                raise StopRequested(f"stopped after step {step}; go on with --resume")
        (directory / "final").mkdir()
except StopRequested:
    sys.exit(3)
finally:
    lock.release()
