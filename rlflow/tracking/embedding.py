"""Which rollouts a page holds, and how: steps chosen evenly within a budget, each a chunk of compressed JSON."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlflow.tracking.page_data import episodes
from rlflow.tracking.rollout_files import rollout_files
from rlflow.tracking.rollouts import RolloutFileError, num_rollouts

BUDGET_BYTES = 14 << 20
"""Of all chunks of rollouts in a page, as base64."""
STEPS_WITH_TOKENS = 20
"""So many steps have the text and logprob of each token."""
MOST_EPISODES = 512
"""Of one step."""
MOST_TOKENS = 40_000
"""Of one step; episodes behind them have no tokens."""
MOST_CHARACTERS = 12_000
"""Of a completion or a prompt's text; the middle of a longer one is left out."""


@dataclass(slots=True)
class Embedded:
    """The rollouts of one stage in a page."""

    chunks: dict[str, str] = field(default_factory=dict)
    """Name -> base64."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Of every step on file, in order: step, total, kept, has_tokens, chunk (null where it is left out)."""
    notes: list[str] = field(default_factory=list)
    """What is not in the page, for people."""


def embed_rollouts(
    stage: Path, prefix: str, budget: int = BUDGET_BYTES, tell: Callable[[int, int], None] = lambda done, total: None
) -> Embedded:
    """Packs the rollouts of a stage: the newest step, the first, and of the others as many as the budget takes, evenly.

    Args:
        stage: A stage's directory.
        prefix: Of the chunks' names.
        budget: Bytes of base64. The newest step is there whatever it takes.
        tell: Called with how many steps were read, and how many there are.
    """
    files, embedded = rollout_files(stage), Embedded()
    packed: dict[int, dict[str, Any]] = {}
    damaged: list[str] = []
    left, with_tokens = budget, STEPS_WITH_TOKENS
    for done, step in enumerate(spread(list(files))):
        tell(done, len(files))
        try:
            page = step_page(stage, step, tokens=with_tokens > 0)
        except RolloutFileError as error:
            damaged.append(str(error))
            continue
        chunk = pack(page)
        left -= len(chunk)
        if left < 0 and packed:
            break
        name = f"{prefix}-{step}"
        embedded.chunks[name] = chunk
        kept = {"kept": len(page["episodes"]), "has_tokens": with_tokens > 0, "chunk": name}
        packed[step] = {"step": step, "total": page["total"], **kept}
        with_tokens -= 1
    embedded.steps = [packed[step] for step in files if step in packed]
    embedded.notes = [*_notes(embedded.steps, len(files) - len(damaged)), *damaged]
    return embedded


def step_page(stage: Path, step: int, *, tokens: bool) -> dict[str, Any]:
    """What a page has of a step: so many episodes, tokens and characters at most.

    Raises:
        RolloutFileError: The file cannot be read.
    """
    page = episodes(stage, step, limit=MOST_EPISODES, most_tokens=MOST_TOKENS if tokens else 0)
    for one in page["episodes"]:
        one["completion"] = shorten(one["completion"])
    for prompt in page["prompts"]:
        prompt["text"] = shorten(prompt["text"])
        for message in prompt["messages"]:
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                message["content"] = shorten(message["content"])
    return page


def spread(steps: list[int]) -> Iterator[int]:
    """The last, the first, the one in the middle, those in the middle of the gaps, and so on: however many are taken,
    they lie evenly."""
    if not steps:
        return
    yield steps[-1]
    if len(steps) > 1:
        yield steps[0]
    bounds = [0, len(steps) - 1]
    while any(b - a > 1 for a, b in pairwise(bounds)):
        middles = [(a + b) // 2 for a, b in pairwise(bounds) if b - a > 1]
        # From both ends alternately, so that a budget that ends in between does not leave out the run's end.
        for i in range((len(middles) + 1) // 2):
            yield steps[middles[-1 - i]]
            if i != len(middles) - 1 - i:
                yield steps[middles[i]]
        bounds = sorted([*bounds, *middles])


def pack(value: Any) -> str:
    """Base64 of raw deflate (RFC 1951) of JSON, which DecompressionStream of a browser unpacks."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    compressor = zlib.compressobj(level=6, wbits=-zlib.MAX_WBITS)
    return base64.b64encode(compressor.compress(text.encode()) + compressor.flush()).decode()


def unpack(chunk: str) -> Any:
    """What `pack` was given."""
    return json.loads(zlib.decompress(base64.b64decode(chunk), wbits=-zlib.MAX_WBITS))


def shorten(text: str) -> str:
    """``text`` without its middle when it is long."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def rollouts_on_file(stage: Path) -> int:
    """How many rollouts a stage keeps, those in damaged files left out."""
    total = 0
    for path in rollout_files(stage).values():
        try:
            total += num_rollouts(path)
        except RolloutFileError:
            continue
    return total


def _notes(steps: list[dict[str, Any]], on_file: int) -> Iterator[str]:
    if len(steps) < on_file:
        yield (
            f"Rollouts of {len(steps)} of the {on_file} steps on file are in this page, the newest among them; "
            "`rlflow inspect` reads all of them."
        )
    cut = [step for step in steps if step["kept"] < step["total"]]
    if cut:
        yield f"Of {len(cut)} steps the first {MOST_EPISODES} rollouts are in this page."
    without = sum(not step["has_tokens"] for step in steps)
    if without:
        yield f"Tokens and logprobs are in this page for {len(steps) - without} steps, chosen evenly."
