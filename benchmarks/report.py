"""How large the report of a long run is, how long it takes to write, and how long to open in headless Chromium.

    python benchmarks/report.py [--steps 1000] [--prompts 8] [--group 8] [--tokens 220] [--keep DIRECTORY]

The run is made up: every step has rollouts on file, of random words, as frequent as words are. `opened` is when the
curves of the page stand, counted from the request for it; `a step` is how long the page takes to show the rollouts of
another step, both the median of five. `memory` is what the process that shows the page holds at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.tracking.embedding import BUDGET_BYTES
from rlflow.tracking.report import write_report
from rlflow.tracking.rollouts import write_rollouts
from rlflow.types import Group, Prompt, Rollout
from tests.browser import Tab, browser

WORDS, METRICS, REPEATS = 5000, 90, 5
MEAN_LETTERS = 4
STEP = "document.querySelector('.step').textContent"


def make_run(directory: Path, steps: int, prompts: int, group: int, tokens: int) -> None:
    """A directory as a run of GRPO leaves it."""
    random = np.random.default_rng(0)
    (directory / "rollouts").mkdir(parents=True)
    letters = [chr(ord("a") + i) for i in range(26)]
    drawn = ("".join(random.choice(letters, 2 + random.poisson(MEAN_LETTERS))) for _ in range(WORDS))
    words = list(dict.fromkeys(drawn))
    tokenizer = build_character_tokenizer("x")
    tokenizer.add_tokens([f" {word}" for word in words])
    tokenizer.save_pretrained(directory / "final")
    (directory / "recipe.yaml").write_text("algorithm: {name: grpo}\nmodel: {path: made/up}\n")
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            noise = random.standard_normal(METRICS)
            metrics = {
                "reward/mean": step / steps + 0.1 * noise[0],
                "time/step_s": 20.0 + noise[1],
                "time/train_s": 9.0,
            }
            metrics |= {f"part{i % 9}/metric_{i}": float(value) for i, value in enumerate(noise)}
            file.write(json.dumps({"step": step, "time": 1e9 + step, **metrics}) + "\n")
    for step in range(1, steps + 1):
        groups = [make_group(random, words, index, group, tokens, step) for index in range(prompts)]
        path = directory / "rollouts" / f"step_{step:06d}.parquet"
        advantages = [random.standard_normal(group) for _ in groups]
        write_rollouts(path, groups, advantages, ["trained"] * (prompts * group))


def make_group(random: np.random.Generator, words: list[str], index: int, size: int, tokens: int, step: int) -> Group:
    """Rollouts of between half and one and a half times so many tokens."""
    question = " ".join(random.choice(words, 60))
    columns = {"solution": str(random.integers(10**4)), "source": "made up"}
    messages = [{"role": "user", "content": question}]
    prompt = Prompt(f"set:{step}:{index}", np.arange(60, dtype=np.int32), messages, columns)
    rollouts = []
    for _ in range(size):
        # As frequent as words are: the n-th with 1/n.
        chosen = np.minimum(random.zipf(1.2, random.integers(tokens // 2, tokens * 3 // 2)), len(words)) - 1
        reward = float(random.integers(2))
        rollouts.append(
            Rollout(
                token_ids=np.concatenate([prompt.token_ids, chosen + 3]).astype(np.int32),
                is_sampled=np.arange(60 + len(chosen)) >= 60,
                logprobs=np.concatenate([np.zeros(60), -random.exponential(0.5, len(chosen))]).astype(np.float32),
                versions=np.concatenate([np.full(60, -1), np.full(len(chosen), step - 1)]).astype(np.int32),
                finish_reason="stop",
                text="".join(f" {words[word]}" for word in chosen),
                rewards={"math_accuracy": reward, "format": 1.0},
                reward=reward,
            )
        )
    return Group(prompt, 0, tuple(rollouts))


def open_page(tab: Tab, path: Path) -> tuple[float, float]:
    """Milliseconds until the curves stand, and until another step's rollouts do."""
    tab.call("Page.navigate", url="about:blank")
    tab.open(f"file://{path}")
    ready = float(tab.evaluate("document.documentElement.dataset.ready"))
    tab.wait("document.querySelectorAll('.episodes tbody tr').length")
    before = tab.evaluate(STEP)
    began = time.perf_counter()
    tab.evaluate("document.querySelector('[aria-label=\"step before\"]').click()")
    tab.wait(f"{STEP} !== {json.dumps(before)} && document.querySelectorAll('.episodes tbody tr').length")
    return ready, 1000 * (time.perf_counter() - began)


def renderer_bytes() -> int:
    """The resident memory of the largest of this process's descendants that shows a page."""
    sizes, waiting = [0], [os.getpid()]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            children = [task.read_text().split() for task in process.glob("task/*/children")]
            if b"--type=renderer" in (process / "cmdline").read_bytes():
                status = (process / "status").read_text().split("VmRSS:")[1]
                sizes.append(int(status.split()[0]) << 10)
        except (OSError, IndexError):
            continue  # it has ended since
        waiting += [int(child) for of_task in children for child in of_task]
    return max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 1000), ("prompts", 8), ("group", 8), ("tokens", 220)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, help="make the run there, or take the one that is there")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        run = (arguments.keep or Path(temporary)) / "run"
        if not run.exists():
            make_run(run, arguments.steps, arguments.prompts, arguments.group, arguments.tokens)
        began = time.perf_counter()
        path = write_report(run)
        written = time.perf_counter() - began
        on_file = sum(file.stat().st_size for file in (run / "rollouts").iterdir())
        with browser() as tab:
            tab.look(1280, 900)
            times = [open_page(tab, path) for _ in range(REPEATS)]
            memory = renderer_bytes()
            embedded = tab.evaluate("document.page.data.stages[0].runs[0].rollouts.length")
        opened, turned = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"rollouts on file   {arguments.steps * arguments.prompts * arguments.group}, {on_file / 1e6:.0f} MB")
        print(f"page               {path.stat().st_size / 1e6:.1f} MB, {embedded} of {arguments.steps} steps")
        print(f"its budget         {BUDGET_BYTES / 1e6:.1f} MB of rollouts")
        print(f"written in         {written:.1f} s")
        print(f"opened in          {opened:.0f} ms (slowest {max(ready for ready, _ in times):.0f})")
        print(f"a step in          {turned:.0f} ms")
        print(f"memory             {memory / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
