"""What a report's page was given to show, as its own script unpacks it."""

from __future__ import annotations

import re
from typing import Any

from rlflow.tracking.embedding import unpack


def embedded(page: str) -> dict[str, Any]:
    """What is in the page by the name of its chunk: ``main``, and the rollouts of a step."""
    found = re.findall(r'<script type="text/plain" id="chunk-([^"]+)">([^<]*)</script>', page)
    return {name: unpack(chunk) for name, chunk in found}


def view_of(page: str, stage: int = 0, run: int = 0) -> dict[str, Any]:
    """What the page shows of one stage of one run."""
    return embedded(page)["main"]["stages"][stage]["runs"][run]
