"""`rlflow doctor`: whether this machine can run rlflow, and what to do where it cannot."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import asdict

from rlflow.cli.common import parser_of
from rlflow.doctor.examination import examine
from rlflow.doctor.finding import Finding

SUMMARY = "say what is installed, what fits together and what is in the way, with the remedy"
_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def make_parser() -> argparse.ArgumentParser:
    parser = parser_of("doctor", SUMMARY, "rlflow doctor")
    parser.add_argument("--json", action="store_true", help="a list of {name, level, detail, remedy}")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    findings = examine()
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print("\n".join(lines_of(findings, is_coloured=sys.stdout.isatty())))
    return int(any(finding.level == "fail" for finding in findings))


def lines_of(findings: list[Finding], *, is_coloured: bool) -> list[str]:
    """A line a finding, a remedy under what is not well, and the sum of it."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        level = f"{finding.level:<4}"
        shown = f"\x1b[{_COLOURS[finding.level]}m{level}\x1b[0m" if is_coloured else level
        lines.append(f"{shown}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines += textwrap.wrap(
                f"-> {finding.remedy}", 110, initial_indent=" " * (8 + width), subsequent_indent=" " * (11 + width)
            )
    counts = {level: sum(finding.level == level for finding in findings) for level in _COLOURS}
    lines += ["", f"{counts['ok']} ok, {counts['warn']} to know of, {counts['fail']} in the way"]
    return lines
