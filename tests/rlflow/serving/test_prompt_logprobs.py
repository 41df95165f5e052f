"""What a served model gives the tokens of a prompt: transformers' logprobs in vLLM's form, which make it a teacher."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlflow.actors.rollout_engines.scripted_engine import ScriptedEngine
from rlflow.actors.teacher_model import TeacherModel
from rlflow.actors.teacher_server import TeacherServer
from rlflow.batching import pack
from rlflow.recipe import ModelBlock
from rlflow.recipe.teacher_block import TeacherBlock
from rlflow.serving.models import ServedModel, Settings, open_streams, read_model
from rlflow.serving.streams import Streams
from rlflow.types import Sample
from tests.rlflow.serving.conftest import CONTEXT, Oracle, oracle_of, running, server_of, source_of

httpx = pytest.importorskip("httpx")
IDS = np.random.default_rng(1).integers(2, 60, 300).tolist()
K = 3


def complete(url: str, ids: Any, **options: Any) -> Any:
    body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0} | options
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def table_of(oracle: Oracle, ids: list[int]) -> torch.Tensor:
    """float64 [L - 1, V]: the logprobs of what follows each token."""
    with torch.inference_mode():
        return torch.log_softmax(oracle.model(torch.tensor([ids])).logits[0, :-1].double(), -1)


def assert_those_of(table: torch.Tensor, ids: list[int], choice: Any) -> None:
    assert choice["prompt_token_ids"] == ids and len(choice["token_ids"]) == 1
    first, *places = choice["prompt_logprobs"]
    assert first is None and len(places) == len(ids) - 1
    for row, own, place in zip(table, ids[1:], places, strict=True):
        assert set(map(int, place)) == {own, *row.topk(K).indices.tolist()}
        for id_, said in place.items():
            assert said["logprob"] == pytest.approx(row[int(id_)].item(), abs=2e-5)
            assert said["rank"] == 1 + int((row > row[int(id_)]).sum())


def test_prompt_logprobs_are_those_of_transformers_whatever_is_being_written(
    url: str, oracle: Oracle, streams: Streams
) -> None:
    prompts = [IDS[:40], IDS[40:45], IDS[45:46], IDS[:150]]
    alone = complete(url, prompts[0], max_tokens=60).json()["choices"][0]["text"]
    with ThreadPoolExecutor(2) as threads:
        written = threads.submit(complete, url, prompts[0], max_tokens=60)
        asked = complete(url, prompts, prompt_logprobs=K, return_token_ids=True)
        assert written.result(60).json()["choices"][0]["text"] == alone
    for ids, choice in zip(prompts, asked.json()["choices"], strict=True):
        assert_those_of(table_of(oracle, ids), ids, choice)


def test_a_text_of_several_chunks_has_the_logprobs_of_one(served: ServedModel, oracle: Oracle) -> None:
    streams = open_streams(served, "torch", {}, Settings(max_num_seqs=2))
    said = streams.read("tiny", np.array(IDS), K).result(60)
    streams.close()
    expected = table_of(oracle, IDS).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(said.logprobs[:, 0], expected, atol=2e-5)


def test_each_adapter_says_what_its_own_weights_give(
    policy_dir: Path, adapter_dirs: dict[str, Path], settings: Settings, oracle: Oracle
) -> None:
    model, ids = read_model(source_of(policy_dir), settings), IDS[:12]
    streams = open_streams(model, "torch", adapter_dirs, settings)
    oracles = {"tiny": oracle} | {name: oracle_of(policy_dir, path) for name, path in adapter_dirs.items()}
    with running(server_of(model, streams, adapter_dirs)) as url:
        for name, own in oracles.items():
            (choice,) = complete(url, ids, model=name, prompt_logprobs=K, return_token_ids=True).json()["choices"]
            assert_those_of(table_of(own, ids), ids, choice)
    streams.close()


def test_it_is_a_teacher_as_the_same_model_is_as_an_actor(url: str, policy_dir: Path) -> None:
    policy = ModelBlock(path=str(policy_dir))
    server = TeacherServer(teacher=TeacherBlock.model_validate({"url": url}), policy=policy, longest=32)
    assert server.ready() > 0
    actor = TeacherModel(policy, gpus=0, num_threads=1, seed=0)
    samples = [
        Sample(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= 2, np.zeros(len(ids), dtype=np.float32), group=0)
        for ids in (IDS[:7], IDS[7:30])
    ]
    (batches,) = pack(samples, max_tokens=32, num_ranks=1)
    np.testing.assert_allclose(server.logprobs(batches), actor.logprobs(batches), atol=2e-5)
    ours, theirs = (source.top_logprobs(batches, 30, 1.0) for source in (server, actor))
    np.testing.assert_array_equal(ours[..., 0], theirs[..., 0])
    np.testing.assert_allclose(ours[..., 1], theirs[..., 1], atol=1e-4)
    with pytest.raises(ValueError, match=f"takes {CONTEXT}, one of them its own"):
        TeacherServer(teacher=TeacherBlock.model_validate({"url": url}), policy=policy, longest=CONTEXT).ready()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "is of /v1/completions without stream"),
        ({"prompt_logprobs": 0, "stream": True}, "is of /v1/completions without stream"),
        ({"return_token_ids": True, "stream": True}, "is of /v1/completions without stream"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is not a whole number from 0 to"),
        ({"prompt_logprobs": 100_000}, "prompt_logprobs is not a whole number from 0 to"),
        ({"prompt_logprobs": 1, "prompt": [2] * CONTEXT}, "reads 160"),
    ],
)
def test_what_cannot_be_said_of_a_prompt_is_a_bad_request(url: str, options: dict[str, Any], said: str) -> None:
    answer = complete(url, IDS[:5], **options)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_an_engine_that_has_none_says_so(served: ServedModel) -> None:
    engine = ScriptedEngine(2, length=lambda request: 1, token=30)
    engine.load_weights([], 0)
    streams = Streams({"tiny": engine})
    with running(server_of(served, streams)) as url:
        answer = complete(url, IDS[:5], prompt_logprobs=1)
    streams.close()
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")
