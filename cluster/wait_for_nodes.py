"""Wait until a Ray cluster has as many nodes as asked for: `python wait_for_nodes.py NODES`, address in RAY_ADDRESS."""

from __future__ import annotations

import logging
import sys
import time

import ray

TIMEOUT_S = 600


def main() -> int:
    wanted, deadline = int(sys.argv[1]), time.monotonic() + TIMEOUT_S
    alive = 0
    while time.monotonic() < deadline:
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
            alive = sum(node["Alive"] for node in ray.nodes())
        except ConnectionError as error:
            print(f"no Ray head yet: {error}", file=sys.stderr, flush=True)
        if alive >= wanted:
            print(f"{alive} of {wanted} Ray nodes are up", flush=True)
            return 0
        time.sleep(2)
    print(f"{alive} of {wanted} Ray nodes after {TIMEOUT_S} s: see the log of `ray start` above", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
