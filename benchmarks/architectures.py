"""What trainer, LoRA, weight sync, torch engine and vLLM make of every causal architecture of transformers.

    python benchmarks/architectures.py docs/architectures.md       # every part but vLLM; the table in a document
    python benchmarks/architectures.py --vllm docs/architectures.md        # vLLM as well
    python benchmarks/architectures.py qwen3 gpt_oss               # these alone

Each part of each architecture is looked at in a process of its own with a deadline (architecture_parts.py), and its
verdict is written down in --results at once: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architecture_parts as parts
import torch
import transformers
from tiny_architectures import build
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from rlflow.actors.rollout_engines import vllm_start
from rlflow.progress import ProgressBar
from rlflow.recipe.architectures import how_run

HEAD = "| architecture | trained and scored | LoRA and merged sync | torch engine, two syncs | vLLM, two syncs | why |"
PARTS: dict[str, Callable[[str], tuple[str, str]]] = {
    "trained": parts.trained,
    "adapter": parts.adapter,
    "engine": parts.engine,
    "vllm": parts.vllm,
}
Results = dict[tuple[str, str], tuple[str, str]]
"""(architecture, part) -> verdict, and what is to be said of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", metavar="DOCUMENT.md | ARCHITECTURE")
    parser.add_argument("--vllm", action="store_true", help="run vLLM as well, some ten seconds each")
    parser.add_argument("--seconds", type=float, default=120, help="that a part may take")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "rlflow_architectures.jsonl")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    documents = [Path(given) for given in options.given if given.endswith(".md")]
    names = [given for given in options.given if not given.endswith(".md")] or list(NAMES)
    wanted = [part for part in PARTS if part != "vllm" or options.vllm]
    results = _read(options.results)
    if options.vllm:
        _import_vllm()
    with ProgressBar("architectures", "architectures") as bar:
        for number, name in enumerate(names):
            _look_at(name, wanted, results, options)
            bar.update(number + 1, len(names), name)
    rows = [_row(name, results) for name in names]
    table = "\n".join([HEAD, "|---|---|---|---|---|---|", *rows])
    print(table)
    for document in documents:
        head, _, _ = document.read_text().partition(HEAD)
        document.write_text(f"{head}{table}\n")


def _import_vllm() -> None:
    """Once, for all children."""
    vllm_start.prepare_process(num_threads=1, log_path=None)
    with vllm_start.quiet(None):
        importlib.import_module("vllm.v1.engine.llm_engine")


def _look_at(name: str, wanted: list[str], results: Results, options: argparse.Namespace) -> None:
    """What is not known yet of an architecture; nothing more of one that cannot be made or is refused."""
    for part in wanted:
        if results.get((name, "trained"), ("", ""))[0] in ("not tried", "refused"):
            return
        if (name, part) not in results:
            results[name, part] = _in_a_child(name, part, options.seconds)
            with options.results.open("a") as file:
                file.write(json.dumps([name, part, *results[name, part]]) + "\n")


def _in_a_child(name: str, part: str, seconds: float) -> tuple[str, str]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, part, theirs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return "not tried", f"it takes over {seconds:.0f} s"
        return ours.recv()
    except EOFError:
        return "FAULT", "the process ended without a word"
    finally:
        child.kill()
        child.join()


def _child(name: str, part: str, answers: Any) -> None:
    if part == "trained":
        try:
            build(name)
        # Some want parts that are not installed, or cannot be small.
        except Exception as error:
            answers.send(("not tried", f"a small one cannot be made: {parts.shown(error, named=True)}"))
            return
    try:
        answer = PARTS[part](name)
    except ValueError as error:
        answer = "refused", parts.shown(error)
    # What is no sentence is a fault of ours: the table shows it.
    except Exception as error:
        answer = "FAULT", parts.shown(error, named=True)
    answers.send(answer)


def _read(path: Path) -> Results:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(name, part): (verdict, said) for name, part, verdict, said in map(json.loads, lines)}


def _row(name: str, results: Results) -> str:
    known = {part: results[name, part] for part in PARTS if (name, part) in results}
    said = [f"{part}: {words}" if part != "trained" else words for part, (_, words) in known.items() if words]
    verdicts = [known[part][0] if part in known else "" for part in PARTS]
    how = verdicts[0]
    if how in parts.WAYS.values() or how == "refused":
        planned = how_run({"model_type": name})[0]
        if planned != how:
            said.append(f"rlflow plan says {planned}")
    return f"| `{name}` | {' | '.join(verdicts)} | {'; '.join(said)} |"


if __name__ == "__main__":
    main()
