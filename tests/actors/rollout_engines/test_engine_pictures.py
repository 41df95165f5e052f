"""Rollouts from pictures: logprobs before, across and after new weights of all parts are those of transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from rlflow.actors.checkpoint_names import to_checkpoint
from rlflow.actors.rollout_engines.engine import RolloutEngine, generate
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.train_engines.tower import Tower
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.video_archive import is_video
from rlflow.data.vocabulary import placeholder_ids
from rlflow.types import Completion, SampleRequest, SamplingParams
from tests.seeing_models import FAMILIES, write_seeing_model
from tests.vision_models import picture, video

PARAMS = SamplingParams(max_new_tokens=8)
IMAGES = ((picture(40, 24, 1),), (), (picture(20, 20, 2), picture(64, 40, 3)), (picture(40, 24, 4),))
VIDEOS = ((video(40, 24, 4, 1),), (), (picture(20, 20, 2), video(24, 16, 3, 3)), (video(40, 24, 4, 4),))
"""Of models that take some."""


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp(request.param), request.param)


ENGINES = [
    "torch",
    pytest.param(
        "vllm",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
        ],
    ),
]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, seeing: Path) -> Iterator[RolloutEngine]:
    if request.param == "torch":
        yield TorchEngine(str(seeing), dtype="float32", max_num_seqs=5)
        return
    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    made = VllmEngine(
        str(seeing),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=5,
        seed=0,
        gpu_memory_fraction=0.3,
        kv_cache_gib=0.1,
        tensor_parallel_size=1,
        trust_remote_code=False,
        log_path=None,
        num_threads=1,
    )
    yield made
    made.close()


class Policy:
    """The model whose weights are sent, and what transformers' own forward pass says of completions."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(directory).eval()
        self.processor = ImageProcessor(str(directory))
        self.never = placeholder_ids(self.model.config)

    def send(self, engine: RolloutEngine, version: int) -> None:
        named = [(name, parameter.detach().clone()) for name, parameter in self.model.named_parameters()]
        engine.load_weights(to_checkpoint(self.model, named), version)
        engine.leave_out(np.array(self.never))

    @torch.no_grad()
    def change(self) -> None:
        """Every weight of every part, by as much as shows."""
        generator = torch.Generator().manual_seed(1)
        for parameter in self.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    @torch.no_grad()
    def logprobs(self, request: SampleRequest, completion: Completion) -> np.ndarray:
        text = np.concatenate([request.token_ids, completion.token_ids])
        inputs: dict[str, torch.Tensor] = {}
        if request.images:
            tower = Tower(self.model, self.processor)
            inputs = tower.read(text, np.array([0, len(text)]), [request.images], torch.device("cpu")).inputs
        logits = self.model(input_ids=torch.from_numpy(text).long()[None], **inputs).logits[0].float()
        logits = logits.index_fill(-1, torch.tensor(self.never), -torch.inf)
        written = torch.from_numpy(completion.token_ids).long()
        of_written = torch.log_softmax(logits[len(request.token_ids) - 1 : -1], -1).gather(1, written[:, None])
        return of_written.squeeze(1).numpy()


def requests_of(policy: Policy, first: int = 0) -> list[SampleRequest]:
    """Prompts with one picture, none, two, and with the first one's tokens but another picture; a group of two each."""
    generator, made, processor = np.random.default_rng(0), [], policy.processor
    for index, images in enumerate(VIDEOS if processor.takes_videos else IMAGES):
        text = generator.integers(60, 260, 9) if index != 3 else np.random.default_rng(0).integers(60, 260, 9)
        tokens = [processor.video_token_id if is_video(image) else processor.image_token_id for image in images]
        short = np.insert(text, [2 + 3 * i for i in range(len(images))], tokens)
        short = short.astype(np.int32)
        ids = processor.expand(short, images) if images else short
        for copy in range(2):
            id = first + 2 * index + copy
            made.append(SampleRequest(id, ids, id, PARAMS, images, short if images else None))
    return made


def apart(policy: Policy, requests: list[SampleRequest], completions: list[Completion]) -> float:
    pairs = zip(requests, completions, strict=True)
    return max(float(np.abs(policy.logprobs(r, c) - c.logprobs).max()) for r, c in pairs)


def test_logprobs_from_pictures_are_those_of_transformers_before_across_and_after_new_weights(
    engine: RolloutEngine, seeing: Path
):
    policy, old = Policy(seeing), Policy(seeing)
    policy.send(engine, 0)
    requests = requests_of(policy)
    first = generate(engine, requests)
    assert apart(policy, requests, first) < 2e-5
    assert not np.isin(np.concatenate([c.token_ids for c in first]), policy.never).any()

    engine.add(under_way := requests_of(policy, 100))
    finished = {}
    for _ in range(4):
        finished |= {completion.id: completion for completion in engine.step()}
    policy.change()
    policy.send(engine, 1)
    while engine.num_running + engine.num_waiting:
        finished |= {completion.id: completion for completion in engine.step()}
    both = 0
    for request in under_way:
        completion = finished[request.id]
        by_version = np.where(
            completion.versions == 0, old.logprobs(request, completion), policy.logprobs(request, completion)
        )
        assert np.abs(by_version - completion.logprobs).max() < 2e-5
        both += set(completion.versions.tolist()) == {0, 1}
    assert both >= 4

    after = generate(engine, requests)
    assert apart(policy, requests, after) < 2e-5
    assert apart(old, requests, after) > 0.01


def test_samples_of_a_prompt_read_its_picture_once(seeing: Path, monkeypatch: pytest.MonkeyPatch):
    engine, policy = TorchEngine(str(seeing), dtype="float32", max_num_seqs=4), Policy(seeing)
    policy.send(engine, 0)
    read, seen = Tower.read_rows, []
    monkeypatch.setattr(Tower, "read_rows", lambda self, *args: seen.append(len(args[2])) or read(self, *args))
    requests = requests_of(policy)[:2]
    generate(engine, requests)
    assert seen == [1]
