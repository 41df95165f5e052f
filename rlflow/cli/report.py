"""`rlflow report`: a finished or running run as one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlflow.cli.common import parser_of
from rlflow.tracking.history import HistoryError

SUMMARY = "write report.html, one page about a run that opens without a network"


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of("report", SUMMARY, "rlflow report runs/gsm8k")
    parser.add_argument("directory", metavar="RUN_DIR", type=Path, help="a run's directory, or that of its stages")
    parser.add_argument(
        "--curve",
        metavar="FILE.svg",
        type=Path,
        help="instead of the page, draw the metrics of --keys as a picture",
    )
    parser.add_argument("--keys", metavar="KEY", nargs="+", default=["reward/mean"], help="metrics of the picture")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    from rlflow.tracking.report import write_curve_svg, write_report

    try:
        if arguments.curve is not None:
            write_curve_svg(arguments.directory, arguments.keys, arguments.curve)
            print(arguments.curve)
        else:
            print(write_report(arguments.directory))
    except HistoryError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
