"""Starts of a LoRA that are computed of the model and its data before training (PEFT's `init_lora_weights`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlflow.recipe.problems import nearest

INIT = "init_lora_weights"


@dataclass(frozen=True, slots=True)
class PreparedStart:
    """What PEFT does before a LoRA with this start is trained."""

    reads_data: bool
    """It reads some of the training data."""
    is_subtracted: bool
    """B A is not 0 at the start, and PEFT takes it out of the base. Here the base stays, and the start is taken away
    from what the adapter adds: W + s (B A - B0 A0), the same numbers."""
    gives_out_ranks: bool = False
    """It finds the rank of each layer itself."""
    options: str | None = None
    """The field with its own config."""
    fields: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Of that config: kinds of value, or the values themselves where they are text."""


_STARTS = {
    "eva": PreparedStart(
        reads_data=True,
        is_subtracted=False,
        gives_out_ranks=True,
        options="eva_config",
        fields={"rho": (float, int), "tau": (float,), "whiten": (bool,), "adjust_scaling_factors": (bool,)},
    ),
    "lora_ga": PreparedStart(
        reads_data=True,
        is_subtracted=True,
        options="lora_ga_config",
        fields={
            "direction": ("ArBr", "A2rBr", "ArB2r", "random"),
            "scale": ("stable", "weight_svd", "gd_scale", "unit"),
            "stable_gamma": (int,),
        },
    ),
    "corda": PreparedStart(
        reads_data=True, is_subtracted=True, options="corda_config", fields={"corda_method": ("ipm", "kpm")}
    ),
    "pissa": PreparedStart(reads_data=False, is_subtracted=True),
    "olora": PreparedStart(reads_data=False, is_subtracted=True),
}
"""EVA (arXiv 2410.07170), LoRA-GA (2407.05000), CorDA (2406.05223), PiSSA (2404.02948), OLoRA (2406.01775)."""
OPTIONS = {start.options for start in _STARTS.values() if start.options}


def prepared_start(config: Mapping[str, Any]) -> PreparedStart | None:
    """Of a LoRA's config; None where nothing is to be prepared."""
    init = config.get(INIT)
    if not isinstance(init, str):
        return None
    return _STARTS.get(re.sub(r"^pissa_niter_\d+$", "pissa", init.lower()))


def start_problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with how a LoRA is to start: (field, what and what to do)."""
    start = prepared_start(config)
    for name in sorted(OPTIONS & config.keys()):
        options = config[name]
        if options in (None, {}):
            continue
        if start is None or start.options != name:
            yield name, f"is read with {INIT}: {name.removesuffix('_config')} alone: remove it"
        elif not isinstance(options, Mapping):
            yield name, f"holds fields: {', '.join(start.fields)}"
        else:
            yield from ((name, problem) for problem in _option_problems(start.fields, options))
    if start is None:
        return
    for name in ("use_dora", "target_parameters"):
        if config.get(name):
            yield name, f"does not go with {INIT}: {config[INIT]}, which starts from the weights of layers: remove it"
    if start.gives_out_ranks and config.get("rank_pattern"):
        yield "rank_pattern", f"is found by {INIT}: {config[INIT]}: remove it"
    if start.is_subtracted and config.get("lora_dropout"):
        yield "lora_dropout", f"would drop what {INIT}: {config[INIT]} takes away from the base: set 0"


def _option_problems(fields: Mapping[str, tuple[Any, ...]], options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if key not in fields:
            near = nearest(key, fields)
            yield f"has no {key}{f', did you mean {near}?' if near else ''}. It has {', '.join(fields)}"
        elif isinstance(fields[key][0], str) and value not in fields[key]:
            yield f"{key} must be {' or '.join(fields[key])}; is {value}"
        elif not isinstance(fields[key][0], str) and type(value) not in fields[key]:
            yield f"{key} must be {' or '.join(kind.__name__ for kind in fields[key])}; is {value}"
