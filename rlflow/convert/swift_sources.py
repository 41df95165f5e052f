"""The data sets that ms-swift's flags name, as sources of a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rlflow.convert.given import Given


def sources_of(text: str, given: Given) -> list[dict[str, Any]]:
    """``[hf::|ms::]id-or-path[:subset1/subset2][#n]`` as sources of a recipe, one a subset."""
    path = text.removeprefix("hf::").removeprefix("ms::").removeprefix("HF::").removeprefix("MS::")
    rows: int | None = None
    if "#" in path and path.rpartition("#")[2].isdigit():
        path, _, number = path.rpartition("#")
        rows = int(number)
    subsets: list[str | None] = [None]
    if ":" in path and not Path(path).exists():
        path, _, named = path.rpartition(":")
        subsets = [None if name in ("default", "all") else name for name in named.split("/")]
    columns = given["columns"] if isinstance(given["columns"], dict) else {}
    sources = []
    for subset in subsets:
        source: dict[str, Any] = {"path": path}
        if subset is not None:
            source["subset"] = subset
        if rows:
            source["rows"] = math.ceil(rows / len(subsets))
        if columns:
            source["columns"] = {ours: theirs for theirs, ours in columns.items()}
        sources.append(source)
    return sources
