"""PEFT's methods: which of them can be trained here, what their configs hold, and what is wrong with one. No torch, no
PEFT: ``peft_fields.json`` has the fields of PEFT's dataclasses, which a test compares with the installed PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlflow.recipe.prepared_starts import INIT, OPTIONS, prepared_start, start_problems
from rlflow.recipe.problems import nearest

TYPE = "peft_type"


@dataclass(frozen=True, slots=True)
class PeftMethod:
    """What is known of a method that can be trained; every line of it is tested on a small model."""

    start: Mapping[str, tuple[Any, ...]]
    """Its field that says how it starts, and the values with which the policy starts as its base, the default first;
    empty where it always does."""
    in_16_bits: bool = True
    """It computes beside a base of 16 bits."""
    goes_on: bool = True
    """A model holds two of them, so that one that goes on from another has that as its reference."""
    targets_linear: bool = True
    """It is put on linear layers."""
    gives_out_ranks: bool = False
    """What it trains gets fewer ranks from update to update."""


_USUAL = {"init_weights": (True,)}
METHODS = {
    "ADALORA": PeftMethod({"init_lora_weights": (True,)}, goes_on=False, gives_out_ranks=True),
    "BOFT": PeftMethod(_USUAL),
    "C3A": PeftMethod({"init_weights": (True,)}),
    "DEFT": PeftMethod(_USUAL),
    "DELORA": PeftMethod(_USUAL, in_16_bits=False),
    "FOURIERFT": PeftMethod({"init_weights": (True,)}),
    "GLORA": PeftMethod(_USUAL),
    "GRALORA": PeftMethod(_USUAL),
    "HIRA": PeftMethod({"init_weights": (True, "gaussian")}),
    "HRA": PeftMethod(_USUAL),
    "IA3": PeftMethod({"init_ia3_weights": (True,)}),
    "LN_TUNING": PeftMethod({}, in_16_bits=False, targets_linear=False),
    "LOHA": PeftMethod(_USUAL),
    "LOKR": PeftMethod({"init_weights": (True, "lycoris")}),
    "LORA": PeftMethod({"init_lora_weights": (True, "gaussian", "orthogonal")}),
    "MISS": PeftMethod(_USUAL),
    "OFT": PeftMethod(_USUAL),
    "PEANUT": PeftMethod(_USUAL),
    "PSOFT": PeftMethod(_USUAL),
    "RANDLORA": PeftMethod(_USUAL, goes_on=False),
    "ROAD": PeftMethod(_USUAL),
    "SHIRA": PeftMethod(_USUAL),
    "SUPERTUNING": PeftMethod(_USUAL),
    "TRAINABLE_TOKENS": PeftMethod({"init_weights": (True,)}, targets_linear=False),
    "VERA": PeftMethod(_USUAL, in_16_bits=False, goes_on=False),
    "WAVEFT": PeftMethod({"init_weights": (True,)}),
}
"""By PEFT's ``peft_type``."""

_PROMPTS = "adds tokens to prompts and adapts no layer: train LORA"
_SHARED = "keeps what it trains beside the layers, for all of them together"
REFUSED = {
    "ADAMSS": "needs scikit-learn and a callback in every step: train LORA",
    "ADAPTION_PROMPT": _PROMPTS,
    "BEFT": "trains biases, and PEFT cannot merge one into a layer without: train IA3",
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "FROD": "decomposes all layers together and keeps what it found apart from its weights: train VERA",
    "LILY": "shares tensors over layers, and PEFT cannot merge it: train LORA",
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "OSF": "changes the base's weights in ways that PEFT cannot undo: train HRA",
    "POLY": "needs the task of every row: train LORA, an adapter for each",
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "PVERA": "draws its weights anew in every pass, and what is scored would not be what is trained: train VERA",
    "P_TUNING": _PROMPTS,
    "SHADOW": "is a second model beside the first: train LORA",
    "TINYLORA": f"{_SHARED}: train VERA",
    "UNILORA": f"{_SHARED}, and does not start as its base: train VERA",
    "VBLORA": f"{_SHARED}, and does not start as its base: train VERA",
    "XLORA": "mixes adapters that are trained already: train one of them",
}
"""PEFT's other methods: why not, and what to do."""

NOT_DONE = {
    "mica": "trains B alone: set true",
    "loftq": "changes the base: set true, and quantize for a base in 4 bits",
}
"""Ways in which a LoRA may not start, by how their names begin."""

UNSUPPORTED: dict[str, Any] = {
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "megatron_config": None,
    "loftq_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "fan_in_fan_out": None,
}
"""PEFT's options that train more than layers' weights or want what a recipe cannot say, and the value that means no."""
_OF_THE_RECIPE = {
    "save_projection": "is left out of files, which have its seed",
    "base_model_name_or_path": "is model.path",
    "revision": "is model.revision",
    "task_type": "follows from the algorithm",
    "inference_mode": "is what training is not",
    "total_step": "is how many updates the run has",
}
_SIZES = {"r", "init_r", "alpha", "lora_alpha", "psoft_alpha", "randlora_alpha"}
_PATTERNS = ("rank_pattern", "alpha_pattern")
"""Regular expressions, each with a size."""
_OF_LORA_ALONE = "is of LORA alone and not read"
_NOT_READ = {
    "ADALORA": {
        "rank_pattern": "is found by training",
        "r": "is not read: set init_r, which a layer begins with, and target_r, which it has at the end in the mean",
        **dict.fromkeys(("use_dora", "use_rslora", "alpha_pattern", "target_parameters", "lora_bias"), _OF_LORA_ALONE),
    }
}
"""Fields that a method's config inherits, and what PEFT makes of them."""
_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str, "list": list, "dict": dict}
_BEYOND_PLAIN_LORA = (
    "use_dora",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
    "use_qalora",
)


@cache
def fields_of(method: str) -> dict[str, list[str]]:
    """The fields of a method's config, each with the kinds of value that it takes."""
    return json.loads((Path(__file__).parent / "peft_fields.json").read_text(encoding="utf-8"))[method]


def method_of(config: Mapping[str, Any]) -> str:
    """PEFT's name of it."""
    # PEFT itself has an enumeration, whose members are text.
    return str(getattr(config[TYPE], "value", config[TYPE])).upper()


def peft_problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with a config as a recipe gives it: (field, what and what to do)."""
    if TYPE not in config:
        yield TYPE, f"is missing: name PEFT's method, one of {', '.join(METHODS)}"
        return
    method = method_of(config)
    if method in REFUSED:
        yield TYPE, f"{method} {REFUSED[method]}"
    elif method not in METHODS:
        near = nearest(method, METHODS)
        yield TYPE, f"is {config[TYPE]}{f': did you mean {near}?' if near else '.'} There are {', '.join(METHODS)}"
    else:
        for field, value in config.items():
            if field != TYPE and (problem := _problem(method, field, value)):
                yield field, problem
        if METHODS[method].gives_out_ranks:
            yield from _rank_problems(config)
        if method == "LORA":
            yield from start_problems(config)


def _rank_problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the ranks that are given out; PEFT begins with 12 and ends with 8."""
    first, last = config.get("init_r", 12), config.get("target_r", 8)
    if isinstance(first, int) and isinstance(last, int) and not 0 < last < first:
        yield "target_r", f"is {last}: it must be less than init_r, {first}, and at least 1"


def _problem(method: str, field: str, value: Any) -> str | None:
    known = fields_of(method)
    if field in _OF_THE_RECIPE:
        return f"{_OF_THE_RECIPE[field]}: remove it"
    if reason := _NOT_READ.get(method, {}).get(field):
        return f"{reason}: remove it"
    if field not in known:
        near = nearest(field, known)
        return f"{method} has no such field{f', did you mean {near}?' if near else ''}. It has {', '.join(known)}"
    if field in OPTIONS:
        return None
    if field in UNSUPPORTED:
        return None if value in (UNSUPPORTED[field], None, False, [], {}) else "is not supported: remove it"
    if field == INIT and method != "LORA" and isinstance(value, str):
        return f"{value} is of LORA: remove it"
    if field == INIT and prepared_start({INIT: value}) is not None:
        return None
    if field.startswith("init_") and isinstance(value, str):
        for name, reason in NOT_DONE.items():
            if method == "LORA" and value.lower().startswith(name):
                return f"{value} {reason}"
    if not any(_is_of_kind(value, kind) for kind in known[field]):
        return f"must be {' or '.join(known[field])}; is {json.dumps(value, default=str)}"
    return _value_problem(method, field, value)


def _value_problem(method: str, field: str, value: Any) -> str | None:
    """What is wrong with a value of the right kind."""
    # OFT's is 0 where the size of its blocks is given.
    if field in _SIZES and value is not None and value <= 0 and (method, field) != ("OFT", "r"):
        return f"must be more than 0; is {value}"
    if field == "token_indices" and (
        not value or len(set(map(str, value))) < len(value) or not all(map(_is_id, value))
    ):
        return "must list ids of tokens, each once"
    sizes = value if field in _PATTERNS and value else {}
    for pattern, size in sizes.items():
        if not _is_of_kind(size, "float") or size <= 0:
            return f"{pattern} must be more than 0; is {json.dumps(size, default=str)}"
    # Names, or one expression.
    expressions = [value] if field in ("target_modules", "exclude_modules") and isinstance(value, str) else [*sizes]
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            return f"{expression} is no regular expression: {error}"
    return None


def _is_id(value: Any) -> bool:
    return _is_of_kind(value, "int") and value >= 0


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind.startswith("'"):
        return value == kind[1:-1]
    if kind == "null":
        return value is None
    return isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """With all-linear where linear layers are meant and none are named, and with the start that changes nothing."""
    method = METHODS[method_of(config)]
    filled: dict[str, Any] = {field: values[0] for field, values in method.start.items()}
    if "save_projection" in fields_of(method_of(config)):
        # The same matrices are made again of their seed, wherever they are wanted.
        filled["save_projection"] = False
    if method.gives_out_ranks:
        # Whatever is told here, PEFT wants more steps than those in which ranks stay as they are.
        filled["total_step"] = config.get("tinit", 0) + config.get("tfinal", 0) + 1
    if method.targets_linear and not config.get("target_parameters"):
        filled["target_modules"] = "all-linear"
    return {**filled, **config, TYPE: method_of(config)}


def starts_elsewhere(config: Mapping[str, Any]) -> str | None:
    """How the policy starts as another one than its base; None where it starts as its base."""
    method = METHODS[method_of(config)]
    given = completed(config)
    if prepared_start(given) is not None:
        return None
    for field, values in method.start.items():
        if not any(given[field] is value or (isinstance(value, str) and given[field] == value) for value in values):
            return f"with {field}: {json.dumps(given[field])} it starts as another policy than its base"
    return None


def drops_out(config: Mapping[str, Any]) -> str | None:
    """A field that has parts of the adapter left out at random while it is trained."""
    return next((field for field, value in config.items() if field.endswith("dropout") and value), None)


def is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Whether vLLM takes the adapter as it is: A and B of whole linear layers, all with one scale.

    Args:
        config: A recipe's, or an adapter's on disk.
    """
    return method_of(config) == "LORA" and not any(config.get(field) for field in _BEYOND_PLAIN_LORA)


def lora_kind(config: Mapping[str, Any]) -> str:
    """What an adapter that is no plain LoRA is called."""
    if method_of(config) != "LORA":
        return method_of(config)
    beyond = next(field for field in _BEYOND_PLAIN_LORA if config.get(field))
    return "DoRA" if beyond == "use_dora" else f"a LoRA with {beyond}"


def has_lora_modules(config: Mapping[str, Any]) -> bool:
    """Whether the torch engine takes the adapter as it is: LoRA or DoRA of modules."""
    return method_of(config) == "LORA" and not config.get("target_parameters")
