"""`rlflow infer`: a chat with a model in the terminal, or its answers to a data set."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rlflow.cli.calling import WRONG_INPUT
from rlflow.cli.common import parser_of, unicode_text
from rlflow.cli.serving_arguments import (
    add_model_arguments,
    find_named_model,
    loading,
    positive,
    read_models,
    read_named_model,
    reward_named,
    settings_of,
)
from rlflow.data.errors import DataError, RowError, listing
from rlflow.recipe import DataBlock, SourceBlock

if TYPE_CHECKING:
    from rlflow.actors.reward_server import RewardServer
    from rlflow.model_source import ModelSource
    from rlflow.serving.batch import Job
    from rlflow.serving.models import ServedModel, Settings
    from rlflow.serving.sampling import Sampling
    from rlflow.serving.streams import Streams
    from rlflow.types import Prompt

SUMMARY = "chat with a run, a checkpoint or a model, or have it answer a data set"
_EXISTS = "{output} exists already: --resume goes on with it, or name another --output"


def make_parser() -> argparse.ArgumentParser:
    example = (
        "rlflow infer runs/gsm8k\n"
        "  rlflow infer runs/gsm8k --checkpoint best --data test.jsonl --output answers.jsonl --rewards math_accuracy"
    )
    parser = parser_of("infer", SUMMARY, example)
    add_model_arguments(parser)
    parser.add_argument("--adapters", metavar="DIR", type=str, help="an adapter of the model, which is not merged")
    system_help = "system prompt; the recipe's data.system when left out"
    parser.add_argument("--system", metavar="TEXT", type=unicode_text, help=system_help)
    drawn = parser.add_argument_group(
        "how answers are drawn", "as the run drew them, or as the model's generation_config.json says"
    )
    drawn.add_argument("--temperature", type=float, help="0 is greedy")
    drawn.add_argument("--top-p", type=float)
    drawn.add_argument("--top-k", type=int, help="0 keeps every token")
    drawn.add_argument("--max-new-tokens", metavar="TOKENS", type=positive, help="longest answer")
    drawn.add_argument("--seed", type=int, help="the same seed gives the same answers")
    stop_help = "an answer ends before it; may be given again"
    drawn.add_argument("--stop", metavar="TEXT", type=unicode_text, action="append", help=stop_help)
    batch = parser.add_argument_group("answers to a data set, in the place of a chat")
    batch.add_argument("--data", metavar="FILE", help="rows in any format that recipes read, a file or a hub dataset")
    batch.add_argument("--output", metavar="FILE.jsonl", type=Path, help="where answers go, in the order of the data")
    batch.add_argument("--resume", action="store_true", help="go on with an output that is there")
    batch.add_argument("--samples", metavar="N", type=positive, default=1, help="answers a row (1)")
    batch.add_argument("--rows", metavar="N", type=positive, help="use this many rows, drawn with the seed")
    batch.add_argument("--split", default="train", help="of a hub dataset (train)")
    batch.add_argument("--subset", help="of a hub dataset")
    batch.add_argument(
        "--columns", metavar="OURS=THEIRS", nargs="+", default=[], help="names of columns, e.g. prompt=question"
    )
    batch.add_argument("--format", default="auto", help="how a row becomes messages, see docs/data.md (auto)")
    batch.add_argument(
        "--rewards",
        metavar="NAME",
        nargs="*",
        help="reward functions, names or file.py:function; without names the recipe's",
    )
    return parser


def execute(arguments: argparse.Namespace) -> int:
    _check_arguments(arguments)
    from rlflow.serving.models import choose_engine, open_streams

    settings = settings_of(arguments)
    source = find_named_model(arguments)
    if source.recipe is not None and source.recipe.algorithm.learning.held_out:
        return _say_of_rows(arguments, source)
    model = read_named_model(source, settings)
    given = {} if arguments.adapters is None else {_name_of(arguments.adapters, model): arguments.adapters}
    models, adapters = read_models(model, given, settings)
    name = next(iter(adapters), model.source.name)
    engine, base, model = choose_engine(arguments.engine), model, models[name]
    system = _system(arguments, model)
    sampling = _sampling(arguments, model, engine)
    prompts = _prompts(arguments, model, system) if arguments.data is not None else None
    job = _job(arguments, model, name, sampling, settings)
    with contextlib.ExitStack() as opened:
        file, num_done = None, 0
        if prompts is not None:
            # What the output holds is read behind the lock: nobody else adds to it from here on.
            file = opened.enter_context(_open_output(arguments.output, resume=arguments.resume))
            num_done = _num_done(arguments, prompts, job)
        server = _reward_server(job, opened) if prompts is not None and job.rewards else None
        with loading(model, engine):
            streams = open_streams(base, engine, adapters, settings)
        opened.callback(streams.close)
        if prompts is None or file is None:
            return _chat(model, streams, name, sampling, system)
        _answer_all(prompts, num_done, job, streams, server, file)
    return 0


def _say_of_rows(arguments: argparse.Namespace, source: ModelSource) -> int:
    """Writes each row with what the model says of it."""
    from rlflow.serving.sequence_outputs import outputs_of_rows

    if arguments.data is None:
        what = f"{source.path} is of {source.recipe and source.recipe.algorithm.name}, and chats with nobody"
        raise DataError(f"{what}: give it rows, --data FILE --output FILE.jsonl")
    if arguments.rewards is not None or arguments.samples > 1 or arguments.resume or arguments.adapters is not None:
        raise DataError("--rewards, --samples, --resume and --adapters are of models that write answers")
    num_rows = 0
    with _open_output(arguments.output, resume=False) as file:
        for rows in outputs_of_rows(source, _source_of(arguments)):
            file.writelines(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in rows)
            file.flush()
            num_rows += len(rows)
    print(f"{arguments.output}: {num_rows} rows")
    return 0


@contextlib.contextmanager
def _open_output(output: Path, *, resume: bool) -> Iterator[TextIO]:
    """The output, open at its end and locked (flock): no other process writes to it within.

    A file that is still empty at the end is removed again.

    Raises:
        DataError: It is there already and is not to be gone on with, or another process writes to it.
    """
    try:
        file = output.open("a" if resume else "x", encoding="utf-8")
    except FileExistsError:
        raise DataError(_EXISTS.format(output=output)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{output} is being written by another rlflow infer: wait until that ends, or name another --output"
            ) from None
        except OSError:
            print(f"{output}: its file system has no locks: let no other process write to it", file=sys.stderr)
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                output.unlink(missing_ok=True)


def _chat(model: ServedModel, streams: Streams, name: str, sampling: Sampling, system: str | None) -> int:
    """Returns the exit code: over a pipe it says whether every message has its answer."""
    from rlflow.serving.conversation import Conversation
    from rlflow.serving.terminal import PlainScreen, TerminalScreen, converse

    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen = TerminalScreen() if is_terminal else PlainScreen()
    if not model.has_template:
        screen.note(f"{model.source.path} has no chat template: it goes on from each text (--chat-template names one)")
    if is_terminal:
        longest = "" if sampling.max_new_tokens is None else f", at most {sampling.max_new_tokens:,} tokens"
        how = "greedy" if not sampling.temperature else f"temperature {sampling.temperature:g}"
        screen.note(f"{name}, {how}{longest}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    converse(Conversation(model, system), streams, name, sampling, screen)
    return WRONG_INPUT if isinstance(screen, PlainScreen) and screen.num_refused else 0


def _answer_all(
    prompts: Sequence[Prompt], num_done: int, job: Job, streams: Streams, server: RewardServer | None, file: TextIO
) -> None:
    """Appends the answers that are not there yet; a line at the end says what came of the rewards."""
    from rlflow.progress import ProgressBar
    from rlflow.rewards.score_batch import ScoringError, merged, told
    from rlflow.serving.batch import answer_prompts
    from rlflow.serving.tally import Tally

    tally = Tally()
    errors: list[ScoringError] = []
    with ProgressBar("answers", "prompts") as bar:

        def progress(done: int, total: int) -> None:
            bar.update(num_done + done, num_done + total, tally.line)

        for rows, failed in answer_prompts(prompts[num_done:], job, streams, server, progress):
            file.writelines(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in rows)
            file.flush()
            tally.add(rows)
            errors = merged([*errors, *failed])
    for line in told(errors):
        print(f"rewards: {line}", file=sys.stderr)
    print(f"{file.name}: {tally.line}")


def _check_arguments(arguments: argparse.Namespace) -> None:
    """
    Raises:
        DataError: They do not go together, or the output is there already.
    """
    output: Path | None = arguments.output
    if (arguments.data is None) != (output is None):
        missing, what = ("--output", "FILE.jsonl") if output is None else ("--data", "FILE")
        raise DataError(f"answers to a data set need {missing} {what}, too")
    if arguments.data is None and (arguments.rewards is not None or arguments.resume or arguments.samples > 1):
        raise DataError("--rewards, --resume and --samples are of --data FILE --output FILE.jsonl")
    if arguments.temperature is not None and not 0 <= arguments.temperature < float("inf"):
        raise DataError(f"--temperature {arguments.temperature}: 0 is greedy, and a finite number above it draws")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise DataError(f"--top-p {arguments.top_p}: a share above 0, at most 1")
    if arguments.top_k is not None and arguments.top_k < 0:
        raise DataError(f"--top-k {arguments.top_k}: 0 keeps every token")
    if output is None:
        return
    if output.exists() and not arguments.resume:
        raise DataError(_EXISTS.format(output=output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.open("ab").close()
        else:
            output.open("xb").close()
            output.unlink()
    except FileExistsError:
        raise DataError(_EXISTS.format(output=output)) from None
    except OSError as error:
        raise DataError(f"--output {output}: {error.strerror}: name one that can be written") from error


def _system(arguments: argparse.Namespace, model: ServedModel) -> str | None:
    """
    Raises:
        DataError: The template takes no system message.
    """
    recipe = model.source.recipe
    if not arguments.system:
        return arguments.system if arguments.system is not None or recipe is None else recipe.data.system
    try:
        model.chat.render_prompt([{"role": role, "content": arguments.system} for role in ("system", "user")])
    except RowError as error:
        raise DataError(f"--system: {error}. Leave it out, or give a --chat-template that takes one") from error
    return arguments.system


def _sampling(arguments: argparse.Namespace, model: ServedModel, engine: str) -> Sampling:
    seed = arguments.seed
    if seed is None and arguments.data is not None:
        seed = model.source.recipe.run.seed if model.source.recipe is not None else 0
    sampling = model.defaults.given(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_new_tokens=arguments.max_new_tokens,
        seed=seed,
        stop=tuple(arguments.stop or ()) or None,
    )
    if arguments.samples > 1 and not sampling.temperature:
        raise DataError(f"--samples {arguments.samples}: greedy answers are all the same: give --temperature")
    if engine == "vllm" and 0 < sampling.temperature < 0.01:
        raise DataError(f"--temperature {sampling.temperature}: vLLM samples at 0.01 at least; 0 is greedy")
    return sampling


def _prompts(arguments: argparse.Namespace, model: ServedModel, system: str | None) -> list[Prompt]:
    """
    Raises:
        DataError: The data cannot be read, or a row is longer than the model reads.
    """
    from rlflow.data.prompts import load_prompts

    recipe, source = model.source.recipe, _source_of(arguments)
    data = DataBlock(
        train=source,
        system=system or None,
        max_prompt_tokens=max(1, model.context - 1),
        template_date=recipe.data.template_date if recipe is not None else None,
    )
    prompts = load_prompts(source, data, model.tokenizer, arguments.seed or 0, vision=model.vision)
    if prompts.notes:
        print(f"not all of these rows is shown to the model:{listing(prompts.notes, 3)}", file=sys.stderr)
    return prompts


def _source_of(arguments: argparse.Namespace) -> SourceBlock:
    """
    Raises:
        DataError: A column or a format is none.
    """
    pairs = [column.partition("=") for column in arguments.columns]
    if strange := [column for column, pair in zip(arguments.columns, pairs, strict=True) if not all(pair)]:
        raise DataError(f"--columns {strange[0]}: write ours=theirs, e.g. prompt=question")
    given: dict[str, Any] = {
        "path": arguments.data,
        "split": arguments.split,
        "subset": arguments.subset,
        "rows": arguments.rows,
        "format": arguments.format,
        "columns": {ours: theirs for ours, _, theirs in pairs},
    }
    try:
        return SourceBlock.model_validate(given)
    except ValueError as error:
        raise DataError(f"--format {arguments.format}: there is none, see docs/data.md") from error


def _job(arguments: argparse.Namespace, model: ServedModel, name: str, sampling: Sampling, settings: Settings) -> Job:
    """
    Raises:
        DataError: The recipe's rewards are wanted, and there are none.
    """
    from rlflow.serving.batch import Job

    rewards = tuple(reward_named(word, "--rewards") for word in arguments.rewards or ())
    recipe = model.source.recipe
    if arguments.rewards == []:
        rewards = tuple(recipe.rewards) if recipe is not None else ()
        if not rewards:
            raise DataError(f"--rewards: {model.source.path} has no recipe with rewards: name them")
    labels = [block.label for block in rewards]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise DataError(f"--rewards: {twice[0]} is there twice")
    return Job(model, name, sampling, arguments.samples, rewards, settings.max_num_seqs)


def _num_done(arguments: argparse.Namespace, prompts: Sequence[Prompt], job: Job) -> int:
    from rlflow.serving.batch import read_answers

    if not arguments.output.stat().st_size:
        return 0
    done = read_answers(arguments.output, prompts, job)
    print(f"{arguments.output} has the answers to {done} of {len(prompts)} prompts", file=sys.stderr)
    return done


def _reward_server(job: Job, opened: contextlib.ExitStack) -> RewardServer:
    """
    Raises:
        DataError: A function cannot be found or loaded.
    """
    from rlflow.actors.reward_server import RewardServer
    from rlflow.rewards import RewardError

    recipe = job.model.source.recipe
    wanted = recipe.reward_server.environment if recipe is not None else ()
    try:
        server = RewardServer(job.rewards, 1, environment=wanted)
        opened.callback(server.close)
        server.ready()
    except RewardError as error:
        raise DataError(f"--rewards: {error}") from error
    return server


def _name_of(adapter: str, model: ServedModel) -> str:
    """What the adapter is called here: as its directory."""
    name = Path(adapter).name
    return name if name != model.source.name else f"{name}-adapter"
