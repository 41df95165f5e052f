"""`rlflow report`: a finished or running run as one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlflow.cli.common import parser_of
from rlflow.tracking.history import HistoryError

SUMMARY = "write report.html, one page about a run that opens without a network"


def make_parser() -> argparse.ArgumentParser:
    example = (
        "rlflow report runs/gsm8k\n  rlflow report runs/gsm8k --compare runs/gsm8k.1 runs/gsm8k.2 -o compared.html"
    )
    parser = parser_of("report", SUMMARY, example)
    parser.add_argument("directory", metavar="RUN_DIR", type=Path, help="a run's directory, or that of its stages")
    parser.add_argument(
        "--compare",
        metavar="RUN_DIR",
        type=Path,
        nargs="+",
        default=[],
        help="draw these runs' curves over its own, and say in which keys their recipes differ",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE.html", type=Path, help="the page; RUN_DIR/report.html if absent"
    )
    parser.add_argument(
        "--curve",
        metavar="FILE.svg",
        type=Path,
        help="instead of the page, draw the metrics of --keys as a picture",
    )
    parser.add_argument("--keys", metavar="KEY", nargs="+", default=["reward/mean"], help="metrics of the picture")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    from rlflow.driver.past_runs import other_versions
    from rlflow.progress import ProgressBar
    from rlflow.tracking.report import ReportError, write_curve_svg, write_report

    for line in other_versions([arguments.directory, *arguments.compare]):
        print(line, file=sys.stderr)
    try:
        if arguments.curve is not None:
            write_curve_svg(arguments.directory, arguments.keys, arguments.curve)
            print(arguments.curve)
        else:
            with ProgressBar("reading rollouts", "steps") as bar:
                path = write_report(
                    arguments.directory, compare=arguments.compare, output=arguments.output, tell=bar.update
                )
            print(path)
    except (HistoryError, ReportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0
