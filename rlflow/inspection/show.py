"""Rollouts and what a replay changed, as lines for a terminal; without one, as plain text.

What the policy wrote is data: control characters, which terminals obey, are shown as escapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from rlflow.data.errors import counted
from rlflow.data.images import media_type, size_of
from rlflow.data.video_archive import frames_of, is_video
from rlflow.inspection.changes import Change, Difference, failed
from rlflow.tracking.lines import number
from rlflow.tracking.rollouts import RolloutRecord
from rlflow.tracking.visible import visible

LONGEST_TEXT = 1500
"""Characters of a text that are shown; the middle of a longer one is left out."""
LEAST_LIKELY = -5.0
"""Nats; tokens that are less likely have the same colour."""


def show_rollout(console: Console, record: RolloutRecord, *, is_whole: bool, tokens: Sequence[str] | None) -> None:
    """One rollout: its numbers, the prompt, the completion, and what rewards saw beside it.

    Args:
        is_whole: Long texts are not cut.
        tokens: The text of every token, to be shown with its logprob; None shows the completion as it was decoded.
    """
    console.print(Text(f"== {_heading(record)}", style="bold"), soft_wrap=True)
    began_with = record.episode.prompt if record.episode is not None else None
    for message in began_with or record.messages:
        _field(console, str(message.get("role")), _said(message), is_whole=is_whole, style="dim")
    for number_of, image in enumerate(record.images, start=1):
        frames = frames_of(image)
        width, height = size_of(frames[0])
        told = f"{width} x {height} pixels, {len(image):,} bytes of {media_type(frames[0])}"
        name, told = ("video", f"{len(frames)} frames of {told}") if is_video(image) else ("image", told)
        _field(console, f"{name} {number_of}", told, is_whole=True, style="dim")
    if tokens is None and record.episode is not None:
        for message in record.episode.messages:
            style = "bold" if message["role"] == "assistant" else "dim"
            _field(console, message["role"], _said(message), is_whole=is_whole, style=style)
    elif tokens is None:
        _field(console, "completion", record.opened + record.completion, is_whole=is_whole, style="bold")
    elif console.is_terminal:
        console.print(Text("completion", style="cyan"), _colored(record, tokens), sep="\n")
    else:
        for text, logprob, version in zip(tokens, record.logprobs.tolist(), record.versions.tolist(), strict=True):
            told = f"{logprob:9.4f}  version {version}" if version >= 0 else "not of the policy   "
            console.print(f"  {told}  {json.dumps(text, ensure_ascii=False)}", soft_wrap=True)
    for name, value in record.columns.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        _field(console, name, text, is_whole=is_whole, style="green")
    if record.error:
        _field(console, "error", record.error, is_whole=is_whole, style="red")


def _said(message: Mapping[str, Any]) -> str:
    """A message's text, with its calls behind it; all of it as JSON where it has no text."""
    content = message.get("content")
    if not isinstance(content, str):
        return json.dumps({key: value for key, value in message.items() if key != "role"}, ensure_ascii=False)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*([content] if content or not calls else []), *calls])


def show_changes(console: Console, changes: Sequence[Change], num_rollouts: int) -> None:
    """A table of what a replay says now, function by function."""
    table = Table(title=None, show_edge=False, header_style="dim", box=None, pad_edge=False)
    for name in ("reward", "same", "changed", "fails now", "failed then", "mean then", "mean now"):
        table.add_column(name, justify="left" if name == "reward" else "right", no_wrap=True)
    for one in changes:
        label = one.name + (" (new)" if one.is_new else " (not replayed)" if one.is_gone else "")
        same, changed = ("-", "-") if one.is_new or one.is_gone else (str(one.same), str(one.changed))
        cells = [same, changed, str(one.failed_now), str(one.failed_then), number(one.mean_then), number(one.mean_now)]
        style = "red" if one.failed_now > one.failed_then else "yellow" if one.changed else ""
        table.add_row(label, *cells, style=style)
    console.print(f"{num_rollouts} rollouts through the rewards as they are now", style="bold")
    console.print(table)


def show_difference(console: Console, difference: Difference, *, is_whole: bool) -> None:
    """A rollout on which a function changed its mind, with both numbers."""
    outcome = difference.outcome
    then = _verdict(difference.name, difference.then, outcome.record.error)
    now = _verdict(difference.name, difference.now, outcome.error)
    console.print(Text(f"{difference.name}: {then} then, {now} now", style="bold yellow"), soft_wrap=True)
    show_rollout(console, outcome.record, is_whole=is_whole, tokens=None)
    if outcome.error and outcome.error != outcome.record.error:
        _field(console, "error now", outcome.error, is_whole=is_whole, style="red")


def show_causes(console: Console, causes: Iterable[tuple[str, int]]) -> None:
    """Why functions fail now, and on how many rollouts."""
    for cause, count in causes:
        console.print(Text(visible(f"{count} x {cause}"), style="red"), soft_wrap=True)


def _heading(record: RolloutRecord) -> str:
    rewards = [f"{name} {number(value)}" for name, value in record.rewards.items()]
    facts = [
        f"step {record.step}",
        f"{record.prompt_id} #{record.sample_index}",
        f"reward {number(record.reward)}",
        *(rewards if len(rewards) > 1 or not rewards else []),
        f"advantage {number(record.advantage)}",
        f"{record.num_tokens} tokens",
        *([] if record.episode is None else [counted(record.num_turns, "turn")]),
        record.finish_reason,
        *([] if record.state == "trained" else [record.state]),
    ]
    return visible(", ".join(facts))


def _field(console: Console, name: str, text: str, *, is_whole: bool, style: str) -> None:
    shown = visible(text if is_whole else _shorten(text))
    if "\n" in shown or len(shown) > 100:
        console.print(Text(visible(name), style="cyan"))
        indented = "\n".join(f"  {line}" for line in shown.split("\n"))
        console.print(Text(indented, style=style), soft_wrap=not console.is_terminal)
    else:
        console.print(Text(f"{visible(name)}  ", style="cyan").append(shown, style=style), soft_wrap=True)


def _shorten(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out, --full shows them ...]\n{text[-half:]}"


def _colored(record: RolloutRecord, tokens: Sequence[str]) -> Text:
    """The tokens, the less likely the redder; what the policy did not write is dim."""
    shown = Text()
    logprobs: list[Any] = record.logprobs.tolist()
    for text, logprob, is_sampled in zip(tokens, logprobs, record.is_sampled.tolist(), strict=True):
        share = 0.0 if math.isnan(logprob) else min(1.0, max(0.0, logprob / LEAST_LIKELY))
        style = Style(dim=True) if not is_sampled else Style()
        if is_sampled and share > 0.02:
            style = Style(color="black", bgcolor=f"rgb(255,{round(235 - 150 * share)},{round(200 - 170 * share)})")
        shown.append(visible(text), style=style)
    return shown


def _verdict(name: str, value: float, error: str) -> str:
    if not math.isnan(value):
        return number(value)
    return "failed" if failed(name, error) else "abstained"
