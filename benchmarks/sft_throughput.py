"""How fast a language model is fine-tuned, and in how much memory: rlflow's options, and TRL's SFTTrainer beside them.

    python benchmarks/sft_throughput.py models/SmolLM2-135M-Instruct --write benchmarks/sft_throughput.md
    python benchmarks/sft_throughput.py models/SmolLM2-135M-Instruct --data train.jsonl     # GSM8K's own file
    python benchmarks/sft_throughput.py --tiny --rows 3 --rounds 1     # a random model, in a minute: does it work?

Some ten minutes on two otherwise idle cores, and 16 GiB; `taskset -c 0,1` chooses the cores where there are more. Every
variant trains the same tokens in the same order with the same options, so their losses must agree: the program says so,
and ends with 1 when they do not. The variants of a group are processes that take turns: one trains a step while the
others wait.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import socket
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import yaml
from sft_variants import BASE, VARIANTS, Report, Settings, log_of, run_rank

from rlflow.actors.host_memory import allocator_environment

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 600.0
TOLERANCE = 1e-3
GIB = 1024**3
Steps = list[list[Report]]
"""[step][rank]."""
EXPLANATION = """
Speed is the median over the steps but the first, which warms up. Tokens are those of the rows, prompts included;
neither filler nor padding counts. The variants are processes that take turns, a step each, in groups that each have a
base of their own; "to the base" is the median of the ratios of speeds on the same step. rlflow's processes allocate
as its trainers do, with jemalloc, TRL's with glibc. Compute threads: {cores}, which two ranks share. A step is one
micro-batch on each rank. rlflow is timed from batching to the optimizer, in its trainer, without Ray; TRL from the
forward pass to the optimizer. Memory is the most a process ever held (VmHWM: libraries and loading included), added
over ranks. Losses are means over the trained tokens; "differs by" is the largest difference from the base's in any
step.
"""


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="sft_throughput_") as directory:
        settings = make_settings(arguments, directory)
        others = [name for name in arguments.only or VARIANTS if name != BASE]
        results: list[dict[str, Steps]] = []
        for start in range(0, max(1, len(others)), arguments.at_once):
            group = others[start : start + arguments.at_once]
            print(f"in turns: {', '.join([BASE, *group])}", file=sys.stderr, flush=True)
            results.append(run_group([BASE, *group], settings))
        through_ray = run_recipe(settings) if arguments.with_ray else []
    page = "\n".join(render(settings, results, through_ray))
    print(page)
    if arguments.write:
        arguments.write.write_text(page + "\n", encoding="utf-8")
    if max(max(differences(of_group, name)) for of_group in results for name in of_group) > TOLERANCE:
        sys.exit(f"the losses of the variants differ by more than {TOLERANCE}: they did not train the same")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a Hugging Face directory or hub id")
    parser.add_argument("--tiny", action="store_true", help="a random model of 0.2M parameters instead")
    parser.add_argument("--data", type=Path, help="JSONL of question and answer; made up when absent")
    parser.add_argument("--rows", type=int, default=8, help="of a step (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps, after one that is not (default 3)")
    parser.add_argument("--at-once", type=int, default=2, help="variants in memory beside the base (default 2)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--with-ray", action="store_true", help="and once as a recipe, after the others")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    arguments = parser.parse_args()
    if (arguments.model is None) != arguments.tiny:
        parser.error("name a model, or say --tiny")
    return arguments


def make_settings(arguments: argparse.Namespace, directory: str) -> Settings:
    from rlflow.data.examples import load_examples
    from rlflow.data.tokenizer import load_tokenizer
    from rlflow.recipe import DataBlock, ModelBlock

    model = make_tiny_model(Path(directory) / "model") if arguments.tiny else arguments.model
    tokenizer = load_tokenizer(ModelBlock(path=model))
    number = arguments.rows * (arguments.rounds + 1)
    source: dict[str, Any] = {"columns": {"prompt": "question", "response": "answer"}}
    if arguments.data:
        source |= {"path": str(arguments.data.resolve()), "rows": number}
    else:
        source |= {"generator": f"{HERE / 'word_problems.py'}:word_problems", "args": {"rows": number}}
    data = {"train": source, "prompts_per_step": arguments.rows, "max_tokens": 4096, "shuffle": False}
    return Settings(
        model=model,
        data=data,
        examples=load_examples(DataBlock.model_validate(data), tokenizer, seed=0),
        learning_rate=2e-5,
        cores=len(os.sched_getaffinity(0)),
        directory=directory,
        # Few enough for a tiny vocabulary to need several chunks, too.
        chunk_elements=512 * len(tokenizer) if arguments.tiny else None,
    )


def make_tiny_model(directory: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from rlflow.data.tokenizer import build_character_tokenizer

    tokenizer = build_character_tokenizer(string.digits + string.ascii_letters + string.punctuation + " \n")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


class Group:
    """The processes of one variant."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.settings = name, settings
        ranks = VARIANTS[name].ranks
        # TRL's users have glibc's allocator, rlflow's trainers bring theirs.
        allocator = {} if VARIANTS[name].trl is not None else allocator_environment()
        environment = {"OMP_NUM_THREADS": str(settings.threads_of(name)), **allocator}
        address = f"127.0.0.1:{free_port()}" if ranks > 1 else None
        context = multiprocessing.get_context("spawn")
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(theirs, name, settings, rank, address), daemon=True)
            with patch.dict(os.environ, environment):
                process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def step(self) -> list[Report]:
        for connection in self.connections:
            connection.send(None)
        return self.receive()

    def receive(self) -> list[Any]:
        """What each rank says next.

        Raises:
            RuntimeError: One ended or says nothing.
        """
        return [self._receive(rank) for rank in range(len(self.connections))]

    def _receive(self, rank: int) -> Any:
        connection, what = self.connections[rank], f"said nothing for {TIMEOUT_S:.0f} s"
        try:
            if connection.poll(TIMEOUT_S):
                return connection.recv()
        except EOFError:
            what = "ended"
        printed = Path(log_of(self.settings, self.name, rank)).read_text(errors="replace")
        raise RuntimeError(f"{self.name}, rank {rank}, {what}. The last it printed:\n{printed[-3000:]}")

    def end(self, patience_s: float) -> None:
        """The processes end by themselves behind the last step; those that are not there by then are ended."""
        for process in self.processes:
            process.join(patience_s)
            process.terminate()
            process.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_group(names: Sequence[str], settings: Settings) -> dict[str, Steps]:
    """All variants' steps, the first of which is for warming up; they take turns, back and forth."""
    groups: dict[str, Group] = {}
    steps: dict[str, Steps] = {name: [] for name in names}
    try:
        for name in names:
            groups[name] = Group(name, settings)
        for group in groups.values():
            group.receive()
        for number, num_tokens in enumerate(settings.tokens_of_steps):
            for name in names if number % 2 == 0 else reversed(names):
                reports = groups[name].step()
                seen = {report.num_tokens for report in reports}
                assert seen == {num_tokens}, f"{name} saw {seen} tokens in step {number + 1}, not {num_tokens}"
                steps[name].append(reports)
                rate = num_tokens / seconds(reports)
                print(f"step {number + 1}  {name:24} {rate:8.1f} tokens/s", file=sys.stderr, flush=True)
    finally:
        done = all(len(of_variant) == len(settings.steps) for of_variant in steps.values())
        for group in groups.values():
            group.end(patience_s=60.0 if done else 0.0)
    return steps


def run_recipe(settings: Settings) -> list[dict[str, float]]:
    """The base by way of `rlflow run`: its metrics of every step."""
    directory = Path(settings.directory)
    recipe = {
        "algorithm": {"name": "sft"},
        "model": {"path": settings.model},
        "data": settings.data,
        "trainer": {
            "learning_rate": settings.learning_rate,
            "tokens_per_micro_batch": max(settings.tokens_of_steps),
            "cpus_per_worker": float(settings.cores),
        },
        "run": {"steps": len(settings.steps), "seed": 0, "output_dir": str(directory / "run")},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run([sys.executable, "-m", "rlflow", "run", directory / "recipe.yaml"], stdout=sys.stderr, check=True)
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    # The first is of the policy before any step.
    return [json.loads(line) for line in lines[1:]]


def seconds(reports: list[Report]) -> float:
    return max(report.seconds for report in reports)


def loss(reports: list[Report]) -> float:
    return sum(report.loss for report in reports)


def differences(of_group: dict[str, Steps], name: str) -> list[float]:
    """Of each step's loss from the base's."""
    return [abs(loss(own) - loss(base)) for own, base in zip(of_group[name], of_group[BASE], strict=True)]


def render(settings: Settings, results: list[dict[str, Steps]], through_ray: list[dict[str, float]]) -> Iterator[str]:
    """The lines of a Markdown page."""
    lengths = sorted(len(example.token_ids) for example in settings.examples)
    trained = sum(int(example.loss_mask.sum()) for example in settings.examples)
    num_steps = len(settings.steps)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed", "trl"))
    yield f"""# Supervised fine-tuning: speed and memory

{Path(settings.model).name} in float32 with AdamW on {settings.cores} CPU cores; {packages}:

    python benchmarks/sft_throughput.py {shlex.join(sys.argv[1:])}

{num_steps} steps of {settings.rows_per_step} rows, {sum(lengths)} tokens, of which {trained} are trained: a row has \
{lengths[0]} to {lengths[-1]}, in the median {lengths[len(lengths) // 2]}.

| | tokens/s | to the base | peak memory, GiB | loss of step {num_steps} | differs by |
|---|---|---|---|---|---|"""
    for name in VARIANTS:
        of_groups = [of_group for of_group in results if name in of_group]
        if of_groups:
            yield row(name, of_groups, settings.tokens_of_steps)
    if through_ray:
        speed = median(step["perf/trained_tokens_per_s"] for step in through_ray[1:])
        own = [step["loss/sft"] for step in through_ray]
        apart = max(abs(a - loss(b)) for a, b in zip(own, results[0][BASE], strict=True))
        yield f"| `rlflow run`, 1 rank | {speed:.0f} | | | {own[-1]:.4f} | {apart:.0e} |"
    yield EXPLANATION.format(cores=settings.cores)
    shown = {name for of_group in results for name in of_group}
    yield from (f"- {name}: {variant.about}" for name, variant in VARIANTS.items() if name in shown)
    if through_ray:
        yield "- `rlflow run`: the base as a recipe, with Ray, after the others; its own perf/trained_tokens_per_s"


def row(name: str, of_groups: list[dict[str, Steps]], tokens: Sequence[int]) -> str:
    """Over all groups that the variant was in: the base was in each."""
    timed = [(number, of_group) for of_group in of_groups for number in range(1, len(tokens))]
    speed = median(tokens[number] / seconds(of_group[name][number]) for number, of_group in timed)
    ratio = median(seconds(of_group[BASE][number]) / seconds(of_group[name][number]) for number, of_group in timed)
    peaks = [max(of_group[name][-1][rank].peak_bytes for of_group in of_groups) for rank in range(VARIANTS[name].ranks)]
    memory = f"{sum(peaks) / GIB:.2f}"
    if len(peaks) > 1:
        memory += f" ({' + '.join(f'{peak / GIB:.2f}' for peak in peaks)})"
    apart = max(max(differences(of_group, name)) for of_group in of_groups)
    last = loss(of_groups[0][name][-1])
    differs = "" if name == BASE else f"{apart:.0e}"
    return f"| {name} | {speed:.0f} | {ratio:.2f} | {memory} | {last:.4f} | {differs} |"


if __name__ == "__main__":
    main()
