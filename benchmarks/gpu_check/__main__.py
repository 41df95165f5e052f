"""One command for a machine with a GPU: are the numbers right there, does a run learn, how fast is it?

    make gpu-check                                        # or, where rlflow's requirements are installed otherwise:
    python benchmarks/gpu_check [--output DIRECTORY] [--seconds 480] [part ...]

Parts run one after the other, each in a process of its own, so that one which crashes, hangs or runs out of memory
stops no other. Parts that need what is not here, a GPU for one, are skipped. benchmarks/gpu_check/README.md says more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from measurements import Measurement, read_measurements  # noqa: E402
from parts import PARTS, Part  # noqa: E402

LEAST_DEADLINE_S = 90.0

Verdict = Literal["ok", "WRONG", "FAILED", "skipped"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part."""

    part: str
    verdict: Verdict
    """WRONG: a number is out of its bounds. FAILED: the part did not come to its end."""
    reason: str = ""
    """Why it was skipped or failed."""
    seconds: float = 0.0
    measurements: list[Measurement] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every part that could run came to its end with the right numbers."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(names)}; all when left out")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), help="where results and logs go")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all parts together")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(names):
        parser.error(f"no part {sorted(unknown)[0]}; there are {', '.join(names)}")
    output = given.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + given.seconds
    outcomes = []
    for part in PARTS:
        if given.parts and part.name not in given.parts:
            continue
        print(f"{part.name}: {part.summary} ... ", end="", flush=True)
        outcome = run(part, output, deadline - time.monotonic())
        outcomes.append(outcome)
        print(f"{outcome.verdict} {outcome.reason}".rstrip() + f", {outcome.seconds:.0f} s" * (outcome.seconds > 0))
        # After every part, so that a machine that is taken away leaves what it measured.
        write(outcomes, output)
    print(f"\n{table(outcomes)}\nwritten to {output}/results.md and results.json")
    return int(any(outcome.verdict in ("WRONG", "FAILED") for outcome in outcomes))


def run(part: Part, output: Path, seconds_left: float) -> Outcome:
    """Runs a part in a child process with a deadline, and kills what it leaves."""
    if reason := missing(part):
        return Outcome(part.name, "skipped", reason)
    if seconds_left < part.seconds / 2:
        return Outcome(part.name, "skipped", f"{seconds_left:.0f} s are left, it takes some {part.seconds:.0f}")
    directory = output / part.name
    directory.mkdir(exist_ok=True)
    results = directory / "measurements.jsonl"
    results.unlink(missing_ok=True)
    started, limit = time.monotonic(), min(max(LEAST_DEADLINE_S, 3 * part.seconds), seconds_left)
    arguments = json.dumps(dict(part.arguments))
    command = [sys.executable, str(HERE / "child.py"), part.function, arguments, str(directory)]
    with (directory / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment()
        )
        try:
            code = process.wait(limit)
            ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        except subprocess.TimeoutExpired:
            code, ending = 1, f"no end within {limit:.0f} s"
        finally:
            end_group(process)
    seconds = time.monotonic() - started
    measured, skipped = read_measurements(results)
    if code:
        log_file = directory / "log.txt"
        return Outcome(part.name, "FAILED", f"{ending}: {last_line(log_file)}; see {log_file}", seconds, measured)
    if skipped:
        return Outcome(part.name, "skipped", skipped, seconds, measured)
    wrong = any(not measurement.is_right for measurement in measured)
    return Outcome(part.name, "WRONG" if wrong else "ok", "", seconds, measured)


def missing(part: Part) -> str:
    """What the part needs and this machine has not; empty when it can run."""
    lacking = [package for package in part.packages if importlib.util.find_spec(package) is None]
    if part.needs_gpu and not has_gpu():
        lacking.insert(0, "a GPU")
    return f"needs {', '.join(lacking)}" if lacking else ""


def has_gpu() -> bool:
    """Without importing torch: the driver's own list."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or any(Path("/dev").glob("nvidia[0-9]*"))


def environment() -> dict[str, str]:
    """Of a part's process and its children: no hub, no network, this checkout's rlflow."""
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**quiet, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def end_group(process: subprocess.Popen) -> None:
    """Kills the part's process and every other of its session that is still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(30)


def last_line(log: Path) -> str:
    """What the part said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def table(outcomes: Sequence[Outcome]) -> str:
    """All outcomes in Markdown."""
    rows = ["| part | what | measured | wanted | |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        rows += [
            f"| {outcome.part} | {m.name} | {m.shown} | {m.wanted} | {'ok' if m.is_right else 'WRONG'} |"
            for m in outcome.measurements
        ]
        if outcome.verdict in ("FAILED", "skipped"):
            rows.append(f"| {outcome.part} | {outcome.reason.replace('|', '/')} | | | {outcome.verdict} |")
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("ok", "WRONG", "FAILED", "skipped")}
    return "\n".join([*rows, "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)])


def write(outcomes: Sequence[Outcome], output: Path) -> None:
    """The table, and the same as JSON."""
    (output / "results.md").write_text(table(outcomes) + "\n")
    (output / "results.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
