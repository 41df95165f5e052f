"""`rlflow algorithms`: the table, or one row of it with every option that it uses."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rlflow.cli.common import parser_of
from rlflow.plan import settings
from rlflow.recipe import ALGORITHMS, AlgorithmBlock, Problem, RecipeError
from rlflow.recipe.problems import did_you_mean
from rlflow.recipe.reference import options
from rlflow.recipe.used_options import can_have_effect, has_effect, needed
from rlflow.recipe.yaml_source import dump_value, merge

SUMMARY = "list the algorithms, or one with all its options"
WIDTH = 120

ONLINE_COLUMNS = ("", "advantage", "ratio, clip", "loss, reduction", "KL", "needs")
OFFLINE_COLUMNS = ("", "loss", "reduction", "numbers", "needs")
FAMILIES = {
    "online": "online: learn from rollouts and their rewards (ref: a reference, critic: a value model)",
    "sft": "sft: learn from demonstrations",
    "preference": "preference: learn from judged answers",
}


def make_parser() -> argparse.ArgumentParser:
    example = "rlflow algorithms grpo"
    parser = parser_of("algorithms", SUMMARY, example)
    parser.add_argument("name", metavar="NAME", nargs="?", help="an algorithm; all of them when left out")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    print(table() if arguments.name is None else row(arguments.name))
    return 0


def table() -> str:
    """The columns of every algorithm, family by family, and what each is."""
    lines = []
    for family, title in FAMILIES.items():
        blocks = [resolved(name) for name, found in ALGORITHMS.items() if found.family == family]
        columns, cells = (ONLINE_COLUMNS, _online) if family == "online" else (OFFLINE_COLUMNS, _offline)
        lines += [title, *_aligned([columns, *map(cells, blocks)]), ""]
    width = max(map(len, ALGORITHMS)) + 2
    for name, found in ALGORITHMS.items():
        lines += _wrapped(f"{name:<{width}}{found.summary} ({found.source})", " " * width)
    return "\n".join(lines)


def row(name: str) -> str:
    """Every option that one algorithm uses, with its value and meaning; ``*`` marks what the row sets.

    Raises:
        RecipeError: There is no such algorithm.
    """
    if name not in ALGORITHMS:
        raise RecipeError([Problem(name, None, "", f"is no algorithm ({did_you_mean(name, list(ALGORITHMS))})")])
    found, block = ALGORITHMS[name], resolved(name)
    own = {setting.key for setting in settings(block)}
    lines = [f"{name}: {found.summary} ({found.source})", f"family: {found.family}", ""]
    idle: dict[str, list[str]] = {}
    for option in options(block):
        if option.key == "name" or not can_have_effect(name, option.key):
            continue
        if not has_effect(block, option.key):
            idle.setdefault(needed(name, option.key), []).append(option.key)
            continue
        lines.append(f"{'*' if option.key in own else ' '} {option.key}: {dump_value(option.value)}")
        lines += _wrapped(f"      {option.doc}", "      ")
    lines += ["", "* set by this algorithm; every option is a key of the recipe's algorithm block"]
    if idle:
        lines += ["", "further options, with other values of these:"]
    for setting, keys in idle.items():
        lines += _wrapped(f"  {setting}: {', '.join(keys)}", "      ")
    return "\n".join(lines)


def resolved(name: str) -> AlgorithmBlock:
    """A row as a recipe has it that sets nothing else."""
    return AlgorithmBlock.model_validate(merge(ALGORITHMS[name].defaults, {"name": name}))


def _online(block: AlgorithmBlock) -> tuple[str, ...]:
    advantage, loss, kl = block.advantage, block.loss, block.kl
    baseline = advantage.estimator if advantage.scale == "none" else f"{advantage.estimator}/{advantage.scale}"
    bounds = f"{_number(loss.clip_low)}/{_number(loss.clip_high)}"
    if loss.kind == "sapo":
        bounds = f"tau {_number(loss.sapo_tau_positive)}/{_number(loss.sapo_tau_negative)}"
    return (
        block.name,
        f"{baseline}, whitened" if advantage.whiten else baseline,
        f"{loss.ratio} {bounds}",
        f"{loss.kind}, {loss.reduction}",
        f"{kl.estimator} {kl.placement} {_number(kl.coef)}" if kl.coef else "",
        ", ".join(_needs(block)),
    )


def _offline(block: AlgorithmBlock) -> tuple[str, ...]:
    objective, preference = ALGORITHMS[block.name].objective, block.preference
    numbers = (
        name if value is True else f"{name} {_number(value)}"
        for name, value in preference
        if name not in ("loss", "reference_free") and value and has_effect(block, f"preference.{name}")
    )
    return (
        block.name,
        preference.loss if objective == "preference" else objective,
        block.loss.reduction if has_effect(block, "loss.reduction") else "",
        ", ".join(numbers),
        ", ".join(_needs(block)),
    )


def _needs(block: AlgorithmBlock) -> Iterator[str]:
    if block.needs_reference:
        yield "ref"
    if block.needs_critic:
        yield "critic"


def _number(value: float) -> str:
    """As short as papers write it: 0.2, 3e-4."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 1e-3 else f"{value:g}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, width=WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
