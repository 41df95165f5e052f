"""Estimates of `rlflow plan` against measured peaks: every case really runs, in processes of its own. Linux only.

    python benchmarks/memory.py models/SmolLM2-135M-Instruct [case ...]

A case is a recipe and a role. Its child process builds the role's own class and does what steps ask of it at the most
tokens that the recipe allows; the largest resident memory that the kernel saw (VmHWM) is the measurement. The other two
models are random and made in a temporary directory. benchmarks/memory.md has the results.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.actors.host_memory import allocator_environment
from rlflow.planning import make_plans
from rlflow.recipe import Recipe, load_recipe
from rlflow.types import Denominators, GroupRequest, MicroBatch, Prompt, Sample, SamplingParams

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", "n_positions": 1024},
    "qwen3-vl": {
        "model_type": "qwen3_vl",
        "text_config": {
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]},
        },
        "vision_config": {
            "depth": 12,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_heads": 8,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 512,
            "deepstack_visual_indexes": [4, 8],
        },
    },
}
"""Random ones. Qwen3: 184M parameters, wide heads, an own head. GPT-2: 124M, LayerNorm, biases, two-matrix MLPs.
Qwen3-VL: a tower of 40M with projectors of 16M, beside a language model of 42M."""
GROUP, PROMPT, NEW = 4, 256, 256
"""Samples of a prompt, tokens of a prompt and of a completion: a sequence has 512."""


@dataclass(frozen=True, slots=True)
class Case:
    role: str
    model: str
    tokens: int
    """Of a micro-batch; by its recipe a rank has two in an update."""
    settings: tuple[str, ...] = ()
    ranks: int = 1


PICTURE = (512, 992)
"""Width and height of the picture in each sequence of a vision-language model: 1,984 patches, 496 of 512 tokens, as the
estimate takes every token for a part of a picture."""


def zero(stage: int) -> tuple[str, ...]:
    return "trainer.engine=deepspeed", f"trainer.deepspeed.stage={stage}"


CHECKPOINTING = "trainer.gradient_checkpointing=true"
ALL_PARTS = "model.train=[language, projector, vision]"
LORA = "model.adapter={kind: lora, rank: 16}"
SHORT = ("data.max_prompt_tokens=448", "rollout.max_new_tokens=64", "rollout.max_num_seqs=16")
CASES = {
    "smollm2": Case("trainer", "smollm2", 2048),
    "smollm2-checkpointing": Case("trainer", "smollm2", 4096, (CHECKPOINTING,)),
    "smollm2-lora": Case("trainer", "smollm2", 2048, (LORA,)),
    "smollm2-bfloat16": Case("trainer", "smollm2", 1024, ("model.dtype=bfloat16",)),
    "smollm2-2-ranks": Case("trainer", "smollm2", 1024, (CHECKPOINTING,), ranks=2),
    "smollm2-mixed-2-ranks": Case("trainer", "smollm2", 1024, ("trainer.fsdp.mixed_precision=true",), ranks=2),
    "smollm2-kept-2-ranks": Case("trainer", "smollm2", 1024, ("trainer.fsdp.reshard_after_forward=false",), ranks=2),
    "smollm2-zero-1-bfloat16": Case("trainer", "smollm2", 1024, (*zero(1), "model.dtype=bfloat16")),
    "smollm2-zero-2": Case("trainer", "smollm2", 1024, zero(2)),
    "smollm2-zero-3-2-ranks": Case("trainer", "smollm2", 1024, zero(3), ranks=2),
    "qwen3": Case("trainer", "qwen3", 2048),
    "qwen3-checkpointing": Case("trainer", "qwen3", 2048, (CHECKPOINTING,)),
    "gpt2": Case("trainer", "gpt2", 2048),
    "gpt2-checkpointing": Case("trainer", "gpt2", 2048, (CHECKPOINTING,)),
    "qwen3-vl": Case("trainer", "qwen3-vl", 2048),
    "qwen3-vl-tower": Case("trainer", "qwen3-vl", 2048, (ALL_PARTS,)),
    "qwen3-vl-checkpointing": Case("trainer", "qwen3-vl", 2048, (ALL_PARTS, CHECKPOINTING)),
    "smollm2-reference": Case("reference", "smollm2", 4096),
    "qwen3-reference": Case("reference", "qwen3", 4096),
    "gpt2-reference": Case("reference", "gpt2", 4096),
    "smollm2-rollout": Case("rollout", "smollm2", 2048, SHORT),
    "qwen3-rollout": Case("rollout", "qwen3", 2048, SHORT),
    "smollm2-vllm": Case("rollout", "smollm2", 2048, (*SHORT, "rollout.engine=vllm", "rollout.kv_cache_gib=1.0")),
}


def recipe_of(case: Case, model_dir: str) -> Recipe:
    prompts = 2 * case.ranks * case.tokens // (PROMPT + NEW) // GROUP
    recipe = {
        "algorithm": {"name": "grpo", "group_size": GROUP},
        "model": {"path": model_dir},
        "data": {"train": {"generator": "arithmetic"}, "prompts_per_step": prompts, "max_prompt_tokens": PROMPT},
        "rewards": [{"name": "exact_match"}],
        "rollout": {"engine": "torch", "max_new_tokens": NEW},
        "trainer": {"tokens_per_micro_batch": case.tokens, "workers": case.ranks},
        "run": {"steps": 1},
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        return load_recipe(path, case.settings)[0]


def noise(width: int, height: int) -> bytes:
    """A picture, as PNG."""
    from PIL import Image

    pixels, buffer = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def batch_of(recipe: Recipe, sequences: int) -> MicroBatch:
    """A packed micro-batch of sequences of the recipe's length."""
    from rlflow.batching import pack
    from rlflow.data.image_processor import load_image_processor

    vision = load_image_processor(recipe.model)
    rng = np.random.default_rng(0)
    length = PROMPT + NEW
    trained = np.arange(length) >= PROMPT
    zeros = np.zeros(length, dtype=np.float32)

    def sequence() -> tuple[np.ndarray, tuple[bytes, ...]]:
        ids = rng.integers(50, 1000, length).astype(np.int32)
        if vision is None:
            return ids, ()
        ids[1], image = vision.image_token_id, noise(*PICTURE)
        return vision.expand(ids, [image])[:length], (image,)

    samples = [
        Sample(
            token_ids=token_ids,
            images=images,
            loss_mask=trained,
            loss_weights=trained.astype(np.float32) / NEW,
            advantages=zeros,
            old_logprobs=zeros,
            ref_logprobs=zeros,
        )
        for token_ids, images in (sequence() for _ in range(sequences))
    ]
    ((batch,),) = pack(samples, max_tokens=sequences * length, num_ranks=1)
    return batch


def train(recipe: Recipe, rank: int, address: str | None, peaks: Peaks) -> None:
    """Two steps: a short one makes the moments; in the other gradients are there when the largest micro-batch comes."""
    from rlflow.actors.policy_trainer import PolicyTrainer

    world = {"rank": rank, "world_size": recipe.trainer.workers}
    trainer = PolicyTrainer(recipe.model, recipe.trainer, num_threads=1, seed=0, **world)
    trainer.setup(address)
    peaks.mark("loading")
    short = batch_of(recipe, 1)
    largest = batch_of(recipe, recipe.trainer.tokens_per_micro_batch // (PROMPT + NEW))
    for step, batches in {"first step": [short], "second step": [short, largest]}.items():
        trainer.forward_backward(batches, recipe.algorithm, Denominators(1, 1, 1))
        assert not trainer.optim_step(1e-6).skipped
        peaks.mark(step)
    snapshot = trainer.weights(1)
    peaks.mark("snapshot")
    assert rank > 0 or snapshot is not None


def refer(recipe: Recipe, peaks: Peaks) -> None:
    from rlflow.actors.reference_model import ReferenceModel

    model = ReferenceModel(recipe.model, gpus=0, num_threads=1, seed=0)
    peaks.mark("loading")
    model.logprobs([batch_of(recipe, recipe.trainer.tokens_per_micro_batch // (PROMPT + NEW))])
    peaks.mark("logprobs")


def generate(recipe: Recipe, peaks: Peaks) -> None:
    """Of the weights' copy on their way, which Ray keeps in shared memory, nothing is left when a worker generates."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlflow.actors.rollout_worker import RolloutWorker
    from rlflow.actors.weight_sync import pack_weights

    worker = RolloutWorker(
        recipe.model,
        recipe.rollout,
        rank=0,
        engine=recipe.rollout.engine,
        max_model_len=PROMPT + NEW,
        num_threads=1,
        seed=0,
        log_directory=Path(tempfile.mkdtemp()),
    )
    assert recipe.model.path is not None
    dtype = getattr(torch, recipe.model.dtype)
    worker.load_weights(
        pack_weights(AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=dtype).named_parameters(), 1)
    )
    peaks.mark("loading")
    peaks.forget()
    rng = np.random.default_rng(0)
    lengths = [recipe.data.max_prompt_tokens - i % 2 for i in range(recipe.data.prompts_per_step)]
    seeds = [tuple(range(GROUP * i, GROUP * i + GROUP)) for i in range(len(lengths))]
    prompts = [Prompt(str(i), rng.integers(5, 1000, n).astype(np.int32), (), {}) for i, n in enumerate(lengths)]
    params = SamplingParams(max_new_tokens=recipe.rollout.max_new_tokens)
    worker.submit([GroupRequest(i, *group, params) for i, group in enumerate(zip(prompts, seeds, strict=True))])
    left = len(prompts)
    while left:
        batch = worker.collect(left, 60.0).batch
        left -= 0 if batch is None else len(batch.group_ids)
    peaks.mark("generation")
    worker.close()


class Peaks:
    """The largest resident memory of this process so far, by what it was doing. Bytes."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def mark(self, name: str) -> None:
        """The phase that ends here; the next one starts from what is resident now."""
        self.seen[name] = _status("VmHWM")
        # https://docs.kernel.org/filesystems/proc.html: 5 resets VmHWM to the current resident set.
        Path("/proc/self/clear_refs").write_text("5")

    def forget(self) -> None:
        """What came before is no part of the measurement."""
        self.seen.clear()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def child(name: str, model_dir: str, rank: int, address: str | None) -> None:
    """Runs a case and prints its peaks as JSON."""
    import ray  # noqa: F401  What every actor has imported.
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    case = CASES[name]
    recipe, peaks = recipe_of(case, model_dir), Peaks()
    peaks.mark("imports")
    match case.role:
        case "trainer":
            train(recipe, rank, address, peaks)
        case "reference":
            refer(recipe, peaks)
        case _:
            generate(recipe, peaks)
    print(json.dumps(peaks.seen))


def make_model(config: dict[str, Any], directory: Path) -> None:
    """Random weights of this architecture, and the processor of one that sees, in a process that ends."""
    kind = "AutoModelForCausalLM"
    if "vision_config" in config:
        from rlflow.data.new_model import write_new_model
        from rlflow.recipe import ModelBlock

        directory.mkdir()
        write_new_model(ModelBlock(architecture=config, characters="0123456789"), directory)
        written = json.loads((directory / "config.json").read_text())
        vocabulary = config["text_config"]["vocab_size"]
        config = written | {"text_config": written["text_config"] | {"vocab_size": vocabulary}}
        kind = "AutoModelForImageTextToText"
    code = (
        f"import json, sys; from transformers import AutoConfig, {kind}\n"
        f"{kind}.from_config(AutoConfig.for_model(**json.loads(sys.argv[1]))).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(config), str(directory)], check=True)


def measure(name: str, model_dir: str) -> dict[str, int]:
    """Peaks of the rank that needs most."""
    ranks, address = CASES[name].ranks, None
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, model_dir, name, "--rank"]
    world = ["--address", address] if address else []
    environment = os.environ | (allocator_environment() if CASES[name].role == "trainer" else {})
    started = [
        subprocess.Popen([*command, str(rank), *world], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    if failed := [process.returncode for process in started if process.returncode]:
        raise RuntimeError(f"case {name} failed with exit code {failed[0]}: see its error above")
    return max((json.loads(output.splitlines()[-1]) for output in outputs), key=lambda peaks: max(peaks.values()))


def row(name: str, model_dir: str) -> str:
    """Of the table: what was estimated, what was measured, in which phase."""
    case = CASES[name]
    (plan,) = make_plans([recipe_of(case, model_dir)])
    (planned,) = (planned for planned in plan.roles if planned.role.name == case.role)
    peaks = measure(name, model_dir)
    phase = max(peaks, key=lambda phase: peaks[phase])
    ratio = planned.bytes_each / peaks[phase]
    parts = {part: f"{size / 2**20:.0f}" for part, size in (planned.parts or {}).items() if size}
    print(name, parts, {phase: f"{size / 2**20:.0f}" for phase, size in peaks.items()}, file=sys.stderr, flush=True)
    settings = ", ".join(
        [f"{case.tokens} tokens", *case.settings, *([f"{case.ranks} ranks"] if case.ranks > 1 else [])]
    )
    sizes = f"{planned.bytes_each / 2**30:.2f} | {peaks[phase] / 2**30:.2f} | {ratio:.2f} | {phase}"
    return f"| {case.role} | {case.model} | {settings} | {sizes} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("smollm2", help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}")
    parser.add_argument("--rank", type=int, help="be the child of this case: the directory is its model's")
    parser.add_argument("--address", help="of rank 0")
    given = parser.parse_args(arguments)
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)[0]}; there are {', '.join(CASES)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if given.rank is not None:
        child(given.cases[0], given.smollm2, given.rank, given.address)
        return
    names = given.cases or list(CASES)
    with tempfile.TemporaryDirectory() as directory:
        directories = {"smollm2": given.smollm2}
        for model in {CASES[name].model for name in names} - directories.keys():
            directories[model] = str(Path(directory) / model)
            make_model(MODELS[model], Path(directories[model]))
        print("| role | model | settings | estimate, GiB | measured, GiB | ratio | at |\n|---|---|---|---|---|---|---|")
        for name in names:
            print(row(name, directories[CASES[name].model]), flush=True)


if __name__ == "__main__":
    main()
