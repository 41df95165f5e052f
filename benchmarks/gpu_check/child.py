"""The process of one part: ``python child.py MODULE:FUNCTION ARGUMENTS DIRECTORY``, the arguments as JSON."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from measurements import Record, Skip


def main(name: str, arguments: str, directory: str) -> None:
    module, _, function = name.partition(":")
    record = Record(Path(directory))
    try:
        getattr(importlib.import_module(module), function)(record, **json.loads(arguments))
    except Skip as reason:
        record.skip(str(reason))


if __name__ == "__main__":
    main(*sys.argv[1:])
