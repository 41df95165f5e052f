"""Random schedules of a window over workers that die: no token too old, no group lost or counted twice, in any of them.

    python benchmarks/schedules.py [--number 1000] [--first 0]

Each is five steps of a random recipe (max_staleness 0 to 4, one to three workers, dynamic sampling or not, what updates
do to completions under way) over workers without models that are killed at random times. What must hold is asserted by
tests/rlflow/driver/schedules.py, which the tests run on forty of them.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from tests.rlflow.driver.fleets import Fleet
from tests.rlflow.driver.schedules import run_schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    began, restarts, refused = time.perf_counter(), 0, 0
    for seed in range(arguments.first, arguments.first + arguments.number):
        fleets: list[Fleet] = []

        def make(num_workers: int, fleets: list[Fleet] = fleets, **options: Any) -> Fleet:
            fleets.append(Fleet(num_workers, **options))
            return fleets[-1]

        run_schedule(seed, make)
        for fleet in fleets:
            restarts += sum(member.incarnation for member in fleet.pool.members.values())
            refused += fleet.pool.refused
            fleet.close()
    seconds = time.perf_counter() - began
    print(
        f"{arguments.number} schedules held in {seconds:.0f} s: {restarts} workers died, {refused} answers were refused"
    )


if __name__ == "__main__":
    main()
