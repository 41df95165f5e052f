"""ms-swift's flags of vision-language models: which parts are trained, and how fast."""

from __future__ import annotations

from rlflow.convert.given import Draft, Given

FROZEN = {"language": "freeze_llm", "projector": "freeze_aligner", "vision": "freeze_vit"}
"""A part of a model -> what leaves it as it is; its default is in the table."""
_RATES = {"projector": "aligner_lr", "vision": "vit_lr"}


def set_parts(given: Given, draft: Draft) -> None:
    """Writes the parts that a command trains, and learning rates of theirs."""
    parts = [part for part, flag in FROZEN.items() if not given[flag]]
    if parts != ["language"]:
        draft.set("model.train", parts, given.texts(*FROZEN.values()))
    for part, flag in _RATES.items():
        if given[flag] is None:
            continue
        if part in parts:
            draft.set(f"model.learning_rates.{part}", float(given[flag]), given.text(flag))
        else:
            draft.note("unneeded", f"{given.text(flag)}: the {part} is not trained ({given.text(FROZEN[part])})")
