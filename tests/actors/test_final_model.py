"""What a run leaves in ``final/``: transformers and vLLM load it as they load any model, and see the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import rlflow
from rlflow.recipe import ModelBlock, TrainerBlock
from tests.local_actors import use_local_actors

TOKENS = [5, 11, 7, 3, 19, 23, 42]

VLLM = """
import os, sys
import numpy as np
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, max_logprobs=-1,
          logprobs_mode="raw_logits", enable_prefix_caching=False, enable_chunked_prefill=False)
tokens = [int(token) for token in sys.argv[3].split(",")]
sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
rows = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0].prompt_logprobs[1:]
np.save(sys.argv[2], np.array([[row[token].logprob for token in range(len(row))] for row in rows]))
"""


@pytest.fixture(scope="module", params=["tiny_model_dir", "tiny_moe_dir"], ids=["dense", "experts"])
def start(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def final(tmp_path_factory, start):
    directory = tmp_path_factory.mktemp("run")
    rows = directory / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Say one.", "response": "one"}) + "\n")
    recipe = {
        "run": {"output_dir": str(directory / "out"), "steps": 3},
        "model": {"path": str(start)},
        "algorithm": {"name": "sft"},
        "data": {"train": {"path": str(rows)}, "prompts_per_step": 1},
        "trainer": {"learning_rate": 1.0e-2},
        "tracking": ["jsonl"],
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_local_actors(monkeypatch)
        rlflow.run(directory / "recipe.yaml")
    return directory / "out" / "final"


def transformers_logits(directory: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0, :-1].numpy()


def test_final_is_the_trained_model_with_its_tokenizer(final, start):
    from transformers import AutoTokenizer

    assert np.abs(transformers_logits(final) - transformers_logits(start)).max() > 0.01
    trained, before = (AutoTokenizer.from_pretrained(path) for path in (final, start))
    messages = [{"role": "user", "content": "Say one."}]
    assert trained.apply_chat_template(messages) == before.apply_chat_template(messages)


def test_final_has_the_names_and_shapes_of_the_checkpoint_it_started_from(final, start):
    stored, before = (load_file(path / "model.safetensors") for path in (final, start))
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: t.shape for name, t in before.items()}


def test_a_rank_that_writes_nothing_holds_no_more_than_two_weights_while_it_takes_part(tmp_path):
    import torch

    from rlflow.actors.policy_trainer import PolicyTrainer

    alive, most = WeakSet(), 0

    class Engine:
        def full_weights(self, *, trained_only: bool):
            nonlocal most
            for layer in range(20):
                # Not a local variable, which would keep it.
                yield f"layers.{layer}", (gathered := [torch.ones(4)])[0]
                alive.add(gathered.pop())
                most = max(most, len(alive))

    trainer = PolicyTrainer(ModelBlock(), TrainerBlock(), rank=1, world_size=2, num_threads=1, seed=0)
    trainer.engine = Engine()  # pyright: ignore[reportAttributeAccessIssue]
    trainer.export(tmp_path)
    assert 1 <= most <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_vllm_loads_final_and_computes_the_logits_of_transformers(final, tmp_path):
    pytest.importorskip("vllm")
    output = tmp_path / "logits.npy"
    command = [sys.executable, "-c", VLLM, str(final), str(output), ",".join(map(str, TOKENS))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = transformers_logits(final)
    assert np.abs(np.load(output) - expected).max() < 1e-4 * np.abs(expected).max()
