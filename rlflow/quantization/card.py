"""What a quantised model's card says: how its weights are stored, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rlflow.quantization.likelihood import Loss
from rlflow.quantization.schemes import Scheme
from rlflow.quantization.texts import Texts
from rlflow.tracking.model_card import CARD

MOST_LOST = 0.1
"""Nats a token; a loss beyond it is a warning. It is a perplexity 1.105 times as large."""
_USE = "\n## Use\n"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made, and how it was measured."""

    scheme: Scheme
    group_size: int | None
    calibrated_on: Texts | None
    measured_on: Texts | None
    loss: Loss | None
    bytes_before: int
    bytes_after: int
    seconds: float
    """Of the rounding alone."""

    @property
    def warning(self) -> str | None:
        """What to say of a loss beyond the bound."""
        if self.loss is None or self.loss.mean <= MOST_LOST:
            return None
        remedy = "fp8 and int8 lose less" if self.scheme.bits == 4 else "export it without --quantize"
        return (
            f"{self.scheme.name} loses {self.loss.mean:.3f} nats a token, more than {MOST_LOST}: measure it on your "
            f"task (`rlflow eval`) before you serve it; {remedy}"
        )

    @property
    def stored(self) -> str:
        """The scheme, as a sentence without its end."""
        groups = f", groups of {self.group_size}" if self.group_size is not None else ""
        return f"{self.scheme.name}{groups}: {self.scheme.summary}"


def write_section(directory: Path, name: str, outcome: Outcome) -> None:
    """Puts the section into the model card of a directory, before its code; a card is made where there is none."""
    path = directory / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {name}\n"
    before, use, behind = text.partition(_USE)
    path.write_text(f"{before.rstrip()}\n\n{section(outcome)}\n{use}{behind}", encoding="utf-8")


def section(outcome: Outcome) -> str:
    """Markdown."""
    scheme = outcome.scheme.name
    size = f"{outcome.bytes_before / 1e6:,.1f} MB before, {outcome.bytes_after / 1e6:,.1f} MB after"
    lines = [
        "## Quantisation",
        "",
        f"`{scheme}`{outcome.stored.removeprefix(scheme)}. Linear layers alone: embeddings, head, norms and routers "
        f"are not rounded. Weights: {size}.",
    ]
    if outcome.calibrated_on is not None:
        lines += ["", f"Calibrated on {len(outcome.calibrated_on.token_ids)} texts of {outcome.calibrated_on.origin}."]
    if outcome.loss is None or outcome.measured_on is None:
        return "\n".join([*lines, "", "The loss of quality was not measured: no held-out text was given."])
    loss, texts = outcome.loss, outcome.measured_on
    lines += [
        "",
        "| held-out text | nats a token | perplexity |",
        "|---|---|---|",
        f"| before | {loss.mean_before:.4f} | {math.exp(loss.mean_before):.3f} |",
        f"| after | {loss.mean_after:.4f} | {math.exp(loss.mean_after):.3f} |",
        "",
        f"{loss.mean:+.4f} nats a token{error_of(loss)}, on {loss.tokens:,} tokens in {len(texts.token_ids)} texts of "
        f"{texts.origin}, by {outcome.scheme.reader}.",
    ]
    if outcome.warning is not None:
        lines += ["", f"**Warning**: {outcome.warning}."]
    return "\n".join(lines)


def error_of(loss: Loss) -> str:
    """The standard error behind a mean, where there is one."""
    return "" if math.isnan(loss.standard_error) else f" (standard error {loss.standard_error:.4f})"
