"""`rlflow eval`: how good a run, its checkpoints or a model are on sets of problems."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlflow.cli.common import parser_of, unicode_text
from rlflow.cli.serving_arguments import (
    add_model_arguments,
    loading,
    positive,
    quiet_libraries,
    reward_named,
    settings_of,
)
from rlflow.data.errors import DataError, nearest
from rlflow.driver.errors import RunError

if TYPE_CHECKING:
    from rlflow.evaluation_sets.measuring import Drawing
    from rlflow.evaluation_sets.reports import Measurement
    from rlflow.evaluation_sets.sets import ProblemSet, Reading
    from rlflow.model_source import ModelSource
    from rlflow.recipe import Recipe
    from rlflow.serving.models import ServedModel

SUMMARY = "measure a run, its checkpoints or a model on sets of problems: pass@k, maj@k, multiple choice"


def make_parser() -> argparse.ArgumentParser:
    example = (
        "rlflow eval runs/gsm8k                                            # on what its recipe evaluates on\n"
        "  rlflow eval runs/gsm8k --sets gsm8k,math500 --samples 8 --k 1,8\n"
        "  rlflow eval runs/gsm8k --sets gsm8k --data gsm8k=test.jsonl --all-checkpoints\n"
        "  rlflow eval Qwen/Qwen3-0.6B --sets humaneval,mmlu,mine.jsonl"
    )
    parser = parser_of("eval", SUMMARY, example)
    add_model_arguments(parser)
    chosen = parser.add_argument_group("on what")
    chosen.add_argument(
        "--sets",
        metavar="NAME,...",
        help="named sets (gsm8k, math500, humaneval, mmlu, arc_easy, arc_challenge), files of yours, or `recipe`: what "
        "the recipe evaluates on, which is taken when this is left out",
    )
    chosen.add_argument(
        "--data",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="a named set's data in a file; may be given again",
    )
    chosen.add_argument("--recipe", metavar="RECIPE", help="a YAML file whose evaluation is measured, of any model")
    chosen.add_argument("--reward", metavar="NAME", help="judges files of yours: a reward, or file.py:function")
    chosen.add_argument("--limit", metavar="N", type=positive, help="use N problems of each set, drawn with the seed")
    chosen.add_argument("--all-checkpoints", action="store_true", help="every checkpoint that the run keeps: a curve")
    chosen.add_argument(
        "--backend", choices=["rlflow", "lm_eval"], default="rlflow", help="lm_eval: its tasks as --sets"
    )
    drawn = parser.add_argument_group(
        "how answers are drawn", "greedy for one sample; otherwise as the recipe's evaluation or its rollouts are drawn"
    )
    drawn.add_argument("--samples", metavar="N", type=positive, help="completions a problem")
    drawn.add_argument("--k", metavar="K,...", help="of pass@k and maj@k; 1 and N when left out")
    drawn.add_argument("--temperature", type=float)
    drawn.add_argument("--top-p", type=float)
    drawn.add_argument("--top-k", type=int)
    drawn.add_argument("--max-new-tokens", metavar="TOKENS", type=positive)
    drawn.add_argument("--seed", type=int, default=0)
    drawn.add_argument("--system", metavar="TEXT", type=unicode_text, help="system message; the recipe's when left out")
    drawn.add_argument("--instruction", metavar="TEXT", help="behind a named set's question, in the place of its own")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="a new directory for results.json and samples; in the run's evaluations/",
    )
    parser.add_argument("--json", action="store_true", help="print results.json in the place of the table")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    """Reads all sets before it loads any weights."""
    _check(arguments)
    from rlflow.model_source import find_model

    names = list(_checkpoints(arguments)) if arguments.all_checkpoints else [arguments.checkpoint]
    first = find_model(arguments.model, checkpoint=names[0], tell=_tell)
    if arguments.backend == "lm_eval":
        from rlflow.evaluation_sets.lm_eval_backend import require_lm_eval

        require_lm_eval()
    output = _output(arguments, first)
    measurements = []
    try:
        for name in names:
            source = first if name == names[0] else find_model(arguments.model, checkpoint=name, tell=_tell)
            inside = output if len(names) == 1 else output / f"step_{source.step:06d}"
            inside.mkdir(exist_ok=True)
            measurements.append(_measure(arguments, source, inside))
        _report(arguments, output, measurements)
    except BaseException:
        _remove(output, is_ours=arguments.output is None)
        raise
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What does not go together, before anything is read."""
    if arguments.all_checkpoints and arguments.checkpoint is not None:
        raise DataError("--all-checkpoints and --checkpoint: leave one out")
    if arguments.temperature is not None and not 0 <= arguments.temperature < float("inf"):
        raise DataError(f"--temperature {arguments.temperature}: 0 is greedy, and a finite number above it draws")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise DataError(f"--top-p {arguments.top_p}: a share above 0, at most 1")
    if arguments.output is not None and arguments.output.exists():
        raise DataError(f"--output {arguments.output} exists already: name a new directory")
    if arguments.backend == "lm_eval" and arguments.sets is None:
        raise DataError("--backend lm_eval needs --sets with its tasks, e.g. --sets gsm8k,hellaswag")
    if arguments.backend == "lm_eval" and (arguments.data or arguments.recipe or arguments.reward):
        raise DataError("--data, --recipe and --reward are of rlflow's own sets: leave out --backend lm_eval")


def _checkpoints(arguments: argparse.Namespace) -> Iterator[str]:
    """The numbers of all steps that the run keeps.

    Raises:
        DataError: There is no such run, or it keeps none.
    """
    from rlflow.checkpoint import saved_steps
    from rlflow.driver.past_runs import CHECKPOINTS, stages_of

    path = Path(arguments.model)
    stages = [stage for stage in stages_of(path) if saved_steps(stage / CHECKPOINTS)] if path.is_dir() else []
    if not stages:
        raise DataError(f"--all-checkpoints: {path} is no run with checkpoints")
    yield from map(str, saved_steps(stages[-1] / CHECKPOINTS))


def _output(arguments: argparse.Namespace, source: ModelSource) -> Path:
    """Makes the directory of the results.

    Raises:
        RunError: It cannot be written.
    """
    what = f"step_{source.step:06d}" if source.step is not None else "final"
    what = "checkpoints" if arguments.all_checkpoints else what
    parent = source.run / "evaluations" if source.run is not None else Path("evaluations") / source.name
    path = arguments.output or parent / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"{path} cannot be made ({error.strerror}): --output DIR names another place") from error
    return path


def _remove(output: Path, *, is_ours: bool) -> None:
    """Takes away what was made for results that did not come whole.

    Args:
        is_ours: Its name, and that of the directory around it, are not the user's.
    """
    shutil.rmtree(output, ignore_errors=True)
    if is_ours:
        with contextlib.suppress(OSError):
            output.parent.rmdir()


def _measure(arguments: argparse.Namespace, source: ModelSource, directory: Path) -> Measurement:
    from rlflow.evaluation_sets.reports import Measurement

    label = source.name if source.step is None else f"step {source.step}"
    if arguments.backend == "lm_eval":
        from rlflow.evaluation_sets.lm_eval_backend import measure_with_lm_eval

        tasks = [name.strip() for name in arguments.sets.split(",") if name.strip()]
        with quiet_libraries():
            results = measure_with_lm_eval(
                source, tasks, arguments.limit, arguments.dtype, directory, trust=arguments.trust_remote_code
            )
        return Measurement(label, source.step, source.path, results)
    from rlflow.evaluation_sets.measuring import measure
    from rlflow.serving.models import choose_engine, read_model

    settings = settings_of(arguments)
    model = read_model(source, settings)
    recipe = _recipe(arguments, source)
    sets = _read_sets(arguments, model, recipe)
    engine = choose_engine(arguments.engine)
    with loading(model, engine):
        results = measure(model, sets, _drawing(arguments), engine, settings, directory, _tell)
    return Measurement(label, source.step, source.path, results)


def _recipe(arguments: argparse.Namespace, source: ModelSource) -> Recipe | None:
    """Whose evaluation is meant: the last stage's of --recipe, or the run's own."""
    if arguments.recipe is None:
        return source.recipe
    from rlflow.recipe import load_recipe

    return load_recipe(arguments.recipe)[-1]


def _read_sets(arguments: argparse.Namespace, model: ServedModel, recipe: Recipe | None) -> list[ProblemSet]:
    """
    Raises:
        DataError: One is none, or cannot be read.
    """
    from rlflow.evaluation_sets.sets import NAMED, read_evaluations

    reading, given = _reading(arguments, model, recipe), dict(_named_files(arguments.data))
    words = [word.strip() for word in (arguments.sets or "").split(",") if word.strip()]
    if not words and not given and recipe is None:
        raise DataError(
            f"{model.source.path} has no recipe to evaluate by: --sets {','.join(NAMED)} or a file of yours"
        )
    words += [name for name in given if name not in words]
    if arguments.recipe is not None and "recipe" not in words:
        words.insert(0, "recipe")
    sets: list[ProblemSet] = []
    for word in words or ["recipe"]:
        if word == "recipe":
            if recipe is None:
                raise DataError(f"--sets recipe: {model.source.path} has none: --recipe names one")
            sets += read_evaluations(recipe, reading)
        else:
            sets.append(_read_set(word, given.get(word), reading))
    if twice := [one.name for one in sets if [other.name for other in sets].count(one.name) > 1]:
        raise DataError(f"--sets: two are called {twice[0]}: rename the file")
    return sets


def _read_set(word: str, file: str | None, reading: Reading) -> ProblemSet:
    from rlflow.evaluation_sets.sets import NAMED, read_named, read_own

    if word in NAMED:
        return read_named(word, file, reading)
    if file is not None or Path(word).is_file():
        return read_own(word if file is not None else Path(word).name.split(".")[0], file or word, reading)
    known = f"there are {', '.join(NAMED)}, `recipe`, and files of yours"
    raise DataError(f"--sets {word}: no set is called so, and no file; {known}.{nearest(word, NAMED)}")


def _named_files(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word in given:
        name, equals, file = word.partition("=")
        if not equals or not file:
            raise DataError(f"--data {word}: write NAME=FILE, e.g. gsm8k=test.jsonl")
        if not Path(file).is_file():
            raise DataError(f"--data {word}: there is no file {file}")
        yield name, file


def _reading(arguments: argparse.Namespace, model: ServedModel, recipe: Recipe | None) -> Reading:
    from rlflow.evaluation_sets.sets import Reading

    reward = None if arguments.reward is None else reward_named(arguments.reward, "--reward")
    system = model.source.system if recipe is None else recipe.data.system
    return Reading(
        model=model,
        system=system if arguments.system is None else arguments.system or None,
        instruction=arguments.instruction,
        limit=arguments.limit,
        seed=arguments.seed,
        reward=reward,
    )


def _drawing(arguments: argparse.Namespace) -> Drawing:
    from rlflow.evaluation_sets.measuring import Drawing

    try:
        ks = tuple(int(k) for k in (arguments.k or "").split(",") if k.strip())
    except ValueError:
        raise DataError(f"--k {arguments.k}: write numbers, e.g. 1,4,8") from None
    if any(k < 1 for k in ks):
        raise DataError(f"--k {arguments.k}: every k is 1 or more")
    return Drawing(
        samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        ks=ks,
    )


def _report(arguments: argparse.Namespace, output: Path, measurements: Sequence[Measurement]) -> None:
    from rlflow.evaluation_sets.reports import CURVE, table, write_results

    path = write_results(output, measurements)
    if arguments.json:
        print(path.read_text(encoding="utf-8"), end="")
        return
    print(table(measurements))
    print(f"\n{path}, samples beside it" + (f"; {output / CURVE}" if (output / CURVE).is_file() else ""))


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
