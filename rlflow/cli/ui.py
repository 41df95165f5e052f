"""`rlflow ui`: the runs of a directory in a browser."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from rlflow.cli.common import parser_of, port_number
from rlflow.data.errors import DataError

SUMMARY = "show the runs of a directory in a browser, live; start, stop, resume and talk to them"
TOKEN_VARIABLE = "RLFLOW_UI_TOKEN"


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of("ui", SUMMARY, "rlflow ui runs")
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=Path("runs"), help="of runs: runs/")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on: 127.0.0.1; any other needs a token")
    parser.add_argument("--port", type=port_number, default=8770, help="port to listen on: 8770; 0 finds a free one")
    parser.add_argument(
        "--token",
        help=f"what browsers must show, 16 characters or more; {TOKEN_VARIABLE} is read too, and hides it from ps; "
        "without either one is made where --host needs it",
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a further name that browsers reach this server by, such as a proxy's",
    )
    return parser


def execute(arguments: argparse.Namespace) -> int:
    from rlflow.ui.guard import SHORTEST_TOKEN, is_loopback, make_token
    from rlflow.ui.server import Settings, serve

    if not arguments.directory.is_dir():
        raise DataError(f"there is no directory {arguments.directory}: name the one that holds runs' directories")
    token = arguments.token or os.environ.pop(TOKEN_VARIABLE, None)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise DataError(f"--token: {len(token)} characters can be guessed: give {SHORTEST_TOKEN} or more, or none")
    if token is None and not is_loopback(arguments.host):
        token = make_token()
    settings = Settings(
        arguments.directory, arguments.host, arguments.port, tuple(arguments.allow_host), token, Path.cwd()
    )
    asyncio.run(serve(settings, _tell))
    return 0


def _tell(text: str) -> None:
    print(text if not text.startswith("http") else f"rlflow ui: {text}   (Ctrl-C ends it)", file=sys.stderr, flush=True)
