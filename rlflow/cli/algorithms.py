"""`rlflow algorithms`: the table, or one row of it with every option that it uses."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rlflow.cli.common import parser_of
from rlflow.planning import settings
from rlflow.recipe import (
    ALGORITHMS,
    TASKS,
    AlgorithmBlock,
    Block,
    OnlineBlock,
    PairBlock,
    Problem,
    RecipeError,
    SFTBlock,
    algorithm_of,
)
from rlflow.recipe.advantage_blocks import BaselineBlock
from rlflow.recipe.block import kinds_in
from rlflow.recipe.policy_loss_blocks import PolicyLossBlock
from rlflow.recipe.problems import did_you_mean
from rlflow.recipe.reference import options
from rlflow.recipe.yaml_source import dump_value

SUMMARY = "list the algorithms, or one with all its options"
WIDTH = 120

ONLINE_COLUMNS = ("", "advantage", "ratio, clip", "loss, reduction", "KL", "needs")
OFFLINE_COLUMNS = ("", "loss", "reduction", "numbers", "needs")


def make_parser() -> argparse.ArgumentParser:
    example = "rlflow algorithms grpo"
    parser = parser_of("algorithms", SUMMARY, example)
    parser.add_argument("name", metavar="NAME", nargs="?", help="an algorithm; all of them when left out")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    print(table() if arguments.name is None else row(arguments.name))
    return 0


def table() -> str:
    """The columns of every algorithm, task by task, and what each is."""
    lines = []
    for task, purpose in TASKS.items():
        blocks = [algorithm_of(name) for name, found in ALGORITHMS.items() if found.task == task]
        online = [_online(block) for block in blocks if isinstance(block, OnlineBlock)]
        offline = [_offline(block) for block in blocks if not isinstance(block, OnlineBlock)]
        tables = [(ONLINE_COLUMNS, online), (OFFLINE_COLUMNS, offline)]
        lines += [f"{task}: {purpose}"] if blocks else []
        lines += [line for columns, cells in tables if cells for line in (*_aligned([columns, *cells]), "")]
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
    found, block = ALGORITHMS[name], algorithm_of(name)
    own = {setting.key for setting in settings(block)}
    lines = [f"{name}: {found.summary} ({found.source})", f"task: {found.task}", ""]
    for option in options(block):
        if option.key != "name":
            lines.append(f"{'*' if option.key in own else ' '} {option.key}: {dump_value(option.value)}")
            lines += _wrapped(f"      {option.doc}", "      ")
    lines += ["", "* set by this algorithm; every option is a key of the recipe's algorithm block"]
    lines += ["", "other kinds of these blocks, each with its own options:", *_other_kinds(block)]
    return "\n".join(lines)


def _other_kinds(block: AlgorithmBlock) -> Iterator[str]:
    """Every kind that a block of the algorithm could be of, with the options that not all kinds have."""
    for field, kinds in kinds_in(type(block)).items():
        for kind in dict.fromkeys(kinds.names.values()):
            names = ", ".join(name for name, named in kinds.names.items() if named is kind)
            own = ", ".join(f"{field}.{key}" for key in kind.model_fields if key not in kinds.shared)
            if not isinstance(getattr(block, field), kind):
                yield from _wrapped(f"  {field}.{kinds.key} {names}: {own or 'no options of its own'}", "      ")


def _online(block: OnlineBlock) -> tuple[str, ...]:
    advantage, loss, kl = block.advantage, block.loss, block.kl
    baseline = advantage.estimator
    if isinstance(advantage, BaselineBlock) and advantage.scale != "none":
        baseline = f"{baseline}/{advantage.scale}"
    return (
        block.name,
        f"{baseline}, whitened" if advantage.whiten else baseline,
        f"{loss.ratio} {_own_numbers(loss)}",
        f"{loss.kind}, {loss.reduction}",
        f"{kl.estimator} {kl.placement} {_number(kl.coef)}" if kl.coef else "",
        ", ".join(_needs(block)),
    )


def _own_numbers(loss: PolicyLossBlock) -> str:
    """The first number that only the loss's kind has, and those whose names begin with the same word."""
    own = [(key, value) for key, value in loss if key not in PolicyLossBlock.model_fields and _is_number(value)]
    if not own:
        return ""
    word = own[0][0].partition("_")[0]
    numbers = "/".join(_number(value) for key, value in own if key.startswith(word))
    return numbers if word == "clip" else f"{word} {numbers}"


def _offline(block: AlgorithmBlock) -> tuple[str, ...]:
    options = [option for name, part in block if isinstance(part, Block) and name != "loss" for option in part]
    numbers = (
        name if value is True else f"{name} {_number(value)}"
        for name, value in options
        if name != "reference_free" and (value is True or (_is_number(value) and value))
    )
    has_likelihood = isinstance(block, SFTBlock) or (isinstance(block, PairBlock) and block.preference.sft_coef)
    return (
        block.name,
        block.preference.loss if isinstance(block, PairBlock) else block.learning.objective,
        block.reduction if has_likelihood else "",
        ", ".join(numbers),
        ", ".join(_needs(block)),
    )


def _needs(block: AlgorithmBlock) -> Iterator[str]:
    if block.needs_reference:
        yield "ref"
    if isinstance(block, OnlineBlock) and block.critic is not None:
        yield "critic"
    if isinstance(block, OnlineBlock) and block.mixture is not None:
        yield "demos"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    """As short as papers write it: 0.2, 3e-4."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 1e-3 else f"{value:g}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, width=WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
