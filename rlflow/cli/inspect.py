"""`rlflow inspect`: the rollouts of a run in the terminal, through the rewards once more, or as data to train on."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlflow.cli.common import parser_of
from rlflow.data.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from rlflow.tracking.rollouts import RolloutRecord

SUMMARY = "read a run's rollouts: filter, sort, score them again, export the good ones"
SHOWN = 10
"""So many rollouts are shown where --limit says nothing."""
SHOWN_DIFFERENCES = 5
PLAIN_WIDTH = 200
"""Characters of a table's line where there is no terminal."""
SHOWN_CAUSES = 5


def make_parser() -> argparse.ArgumentParser:
    example = (
        """rlflow inspect runs/gsm8k --where "reward/math_accuracy < 0.5 and finish_reason == 'length'"\n"""
        "  rlflow inspect runs/gsm8k --steps 100: --replay --rewards my.py:fn\n"
        "  rlflow inspect runs/gsm8k --steps : --where 'reward == 1' --per-prompt 2 --export best.jsonl"
    )
    parser = parser_of("inspect", SUMMARY, example)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's directory, or one of its stages")
    parser.add_argument("--step", type=int, metavar="S", help="rollouts of this step; the newest that has some else")
    parser.add_argument("--steps", metavar="A:B", help="of these steps, both ends included; an end may be left out")
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="those for which it holds: reward, reward/NAME, advantage, num_tokens, finish_reason, state, error, "
        "completion, prompt, the data's columns, ...",
    )
    parser.add_argument("--sort", metavar="KEY", help="by a name or expression, lowest first")
    parser.add_argument("--descending", action="store_true", help="with --sort: highest first")
    parser.add_argument("--per-prompt", type=_positive, metavar="N", help="at most so many of a prompt, in that order")
    parser.add_argument("--limit", type=_positive, metavar="N", help=f"at most so many; {SHOWN} are shown else")
    parser.add_argument("--tokens", action="store_true", help="each token with its logprob, in colour on a terminal")
    parser.add_argument("--full", action="store_true", help="long texts whole")
    parser.add_argument(
        "--replay", action="store_true", help="score them with the rewards as they are now; what changed"
    )
    parser.add_argument(
        "--rewards",
        metavar="FN",
        action="append",
        default=[],
        help="replay with this function instead, a name or file.py:function; may be given several times",
    )
    parser.add_argument("--recipe", metavar="FILE", type=Path, help="replay with the rewards of this recipe")
    parser.add_argument("--export", metavar="FILE.jsonl", type=Path, help="write them as conversations that SFT reads")
    parser.add_argument(
        "--pairs", metavar="FILE.jsonl", type=Path, help="write each group's best and worst as a pair that DPO reads"
    )
    return parser


def execute(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rlflow.driver.past_runs import other_versions
    from rlflow.inspection.selection import distinct, few_a_prompt, find_stage, load_records, steps_asked_for
    from rlflow.progress import ProgressBar
    from rlflow.tracking.filters import filter_records, sort_records
    from rlflow.tracking.rollout_files import rollout_files

    is_replay = arguments.replay or arguments.rewards or arguments.recipe is not None
    stage = find_stage(arguments.run)
    if not is_replay:
        for line in other_versions([stage]):
            print(line, file=sys.stderr)
    steps = steps_asked_for(list(rollout_files(stage)), arguments.step, arguments.steps)
    with ProgressBar("reading rollouts", "steps") as bar:
        records = load_records(stage, steps, tokens=bool(arguments.tokens or is_replay), tell=bar.update)
    chosen = filter_records(records, arguments.where) if arguments.where else records
    chosen = sort_records(chosen, arguments.sort, is_falling=arguments.descending) if arguments.sort else chosen
    written = arguments.export or arguments.pairs
    num_found = len(chosen)
    chosen = distinct(chosen) if arguments.export is not None else chosen
    num_left_out = num_found - len(chosen)
    chosen = few_a_prompt(chosen, arguments.per_prompt) if arguments.per_prompt else chosen
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    named = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    console.print(f"{stage}, {named}: {len(chosen)} of {len(records)} rollouts", style="bold", soft_wrap=True)
    limited = chosen[: arguments.limit] if arguments.limit else chosen
    if arguments.export is not None:
        _export(limited, arguments.export, num_left_out, console)
    if arguments.pairs is not None:
        _export_pairs(limited, arguments.pairs, console)
    if is_replay:
        _replay(limited, records, stage, arguments, console)
    elif written is None:
        _show(limited, stage, arguments, console)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _export(records: Sequence[RolloutRecord], path: Path, num_left_out: int, console: Console) -> None:
    from rlflow.inspection.exporting import export_chat

    export_chat(records, path)
    cut = sum(record.finish_reason == "length" for record in records)
    note = f", of which {cut} were cut: their last turn is not to be trained" if cut else ""
    console.print(f"{path}: {len(records)} conversations{note}", soft_wrap=True)
    if num_left_out:
        reason = "said before in answer to the same prompt, empty in a turn, or cut in their only one"
        console.print(f"{num_left_out} rollouts were left out: {reason}", soft_wrap=True)


def _export_pairs(records: Sequence[RolloutRecord], path: Path, console: Console) -> None:
    from rlflow.inspection.exporting import export_pairs

    console.print(f"{path}: {export_pairs(records, path)} pairs", soft_wrap=True)


def _show(records: Sequence[RolloutRecord], stage: Path, arguments: argparse.Namespace, console: Console) -> None:
    from rlflow.inspection.show import show_rollout
    from rlflow.tracking.history import HistoryError, read_stage
    from rlflow.tracking.token_texts import find_tokenizer, token_texts

    tokenizer = None
    if arguments.tokens:
        try:
            tokenizer = find_tokenizer(stage, read_stage(stage).recipe)
        except HistoryError as error:
            raise DataError(f"{error}; leave out --tokens") from error
        if tokenizer is None:
            print("no tokenizer of this run is on this machine: tokens are shown as ids", file=sys.stderr)
    shown = records if arguments.limit else records[:SHOWN]
    for record in shown:
        tokens = token_texts(tokenizer, record.token_ids.tolist()) if arguments.tokens else None
        show_rollout(console, record, is_whole=arguments.full, tokens=tokens)
    if len(shown) < len(records):
        console.print(f"{len(records) - len(shown)} more: --limit shows them", style="dim")


def _replay(
    chosen: Sequence[RolloutRecord],
    records: Sequence[RolloutRecord],
    stage: Path,
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    from rlflow.inspection.changes import compare, largest
    from rlflow.inspection.replay import companions, replay
    from rlflow.inspection.scorers import scorer_of
    from rlflow.inspection.show import show_causes, show_changes, show_difference
    from rlflow.progress import ProgressBar

    scorer = scorer_of(stage, arguments.recipe, arguments.rewards)
    needed = companions(chosen, records, scorer.algorithm) if scorer.advantages else chosen
    with ProgressBar("scoring", "rollouts") as bar:
        result = replay(needed, scorer, bar.update)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    asked_for = {id(record) for record in chosen}
    outcomes = [outcome for outcome in result.outcomes if id(outcome.record) in asked_for]
    show_changes(console, compare(outcomes), len(outcomes))
    causes = Counter(outcome.error for outcome in outcomes if outcome.error)
    show_causes(console, causes.most_common(SHOWN_CAUSES))
    for difference in largest(outcomes, SHOWN_DIFFERENCES):
        show_difference(console, difference, is_whole=arguments.full)
