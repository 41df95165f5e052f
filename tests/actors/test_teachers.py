"""What a teacher says of tokens, as an actor and over HTTP: transformers' numbers, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from teacher_stand_in import TeacherStandIn, serving_teacher
from transformers import AutoModelForCausalLM

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.rollout_engines import http_calls
from rlflow.actors.rollout_engines.http_calls import ServerError
from rlflow.actors.teacher_model import TeacherModel, to_numpy, to_tensor
from rlflow.actors.teacher_server import TeacherServer
from rlflow.actors.train_engines import token_model
from rlflow.algorithms.distillation import generalized_jsd, with_tail
from rlflow.algorithms.weighing import weigh
from rlflow.batching import RankBatch, pack, unpack
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.recipe import ModelBlock, TrainerBlock, algorithm_of
from rlflow.recipe.teacher_block import TeacherBlock
from rlflow.types import Sample
from tests.conftest import CHARACTERS

K = 4


def samples(vocabulary: int = 60) -> list[Sample]:
    """Sequences of unequal lengths, with a gap in a mask."""
    generator = np.random.default_rng(3)
    found = []
    for length in (7, 12, 5):
        mask = np.arange(length) >= 2
        mask[3] = False
        ids = generator.integers(2, vocabulary, length).astype(np.int32)
        found.append(Sample(ids, mask, np.zeros(length, dtype=np.float32), group=length))
    return found


def packed() -> RankBatch:
    return pack(samples(), max_tokens=16, num_ranks=1)[0]


def logits_before(model_dir: Path, sample: Sample) -> torch.Tensor:
    """float32 [L, V]: transformers' logits from which each loss token was drawn."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    with torch.no_grad():
        logits = model(torch.tensor(sample.token_ids[None].astype(np.int64))).logits[0]
    return logits[np.flatnonzero(sample.loss_mask) - 1]


@pytest.fixture
def teacher(tiny_teacher_dir: Path) -> TeacherModel:
    return TeacherModel(ModelBlock(path=str(tiny_teacher_dir)), gpus=0, num_threads=1, seed=0)


@pytest.fixture
def served(tiny_teacher_dir: Path) -> Iterator[tuple[TeacherStandIn, str]]:
    with serving_teacher(tiny_teacher_dir) as found:
        yield found


def client(url: str, policy: Path, longest: int = 32, **options: object) -> TeacherServer:
    block = TeacherBlock.model_validate({"url": url, **options})
    return TeacherServer(teacher=block, policy=ModelBlock(path=str(policy)), longest=longest)


def test_an_actor_and_a_server_give_each_token_transformers_logprob(
    teacher: TeacherModel, served: tuple[TeacherStandIn, str], tiny_teacher_dir: Path, tiny_model_dir: Path
):
    asked = client(served[1], tiny_model_dir)
    assert asked.ready() >= 0
    for source in (teacher, asked):
        values = unpack(samples(), [packed()], [source.logprobs(packed())])
        for sample, of_sample in zip(samples(), values, strict=True):
            table = torch.log_softmax(logits_before(tiny_teacher_dir, sample), -1)
            targets = torch.tensor(sample.token_ids[sample.loss_mask], dtype=torch.int64)
            expected = table.gather(1, targets[:, None]).squeeze(1).numpy()
            np.testing.assert_allclose(of_sample[sample.loss_mask], expected, atol=2e-5)
            assert not of_sample[~sample.loss_mask].any()


def test_an_actor_and_a_server_name_the_same_most_probable_tokens_and_their_tail(
    teacher: TeacherModel, served: tuple[TeacherStandIn, str], tiny_teacher_dir: Path, tiny_model_dir: Path
):
    asked = client(served[1], tiny_model_dir)
    asked.ready()
    for source in (teacher, asked):
        values = unpack(samples(), [packed()], [source.top_logprobs(packed(), K, 1.0)])
        for sample, of_sample in zip(samples(), values, strict=True):
            logits = logits_before(tiny_teacher_dir, sample)
            ids = logits.topk(K).indices
            found = of_sample[sample.loss_mask]
            np.testing.assert_array_equal(found[:, :-1, 0], ids.numpy())
            assert (found[:, -1, 0] == -1).all()
            np.testing.assert_allclose(found[:, :, 1], with_tail(logits, ids).numpy(), atol=1e-4)


def trainer_of(model_dir: Path) -> PolicyTrainer:
    trainer = PolicyTrainer(
        ModelBlock(path=str(model_dir)), TrainerBlock(), rank=0, world_size=1, num_threads=1, seed=0
    )
    trainer.setup(None)
    return trainer


def divergence(trainer: PolicyTrainer, teacher: TeacherModel, options: dict[str, float | None]) -> float:
    """The loss of a batch whose tokens weigh the same, which is their mean divergence."""
    algorithm = algorithm_of("gkd", distill={"on_policy": 1.0, **options})
    distill = algorithm.distill
    trainer.take_teacher_head(teacher.head())
    if distill.top_k is None:
        name, values = "teacher_hidden", teacher.hidden_states(packed())
    else:
        name, values = "teacher_top", teacher.top_logprobs(packed(), distill.top_k, distill.temperature)
    scored = [
        replace(sample, advantages=np.zeros(len(sample.token_ids), dtype=np.float32), **{name: of_sample})
        for sample, of_sample in zip(samples(), unpack(samples(), [packed()], [values]), strict=True)
    ]
    weighed, denominators = weigh(scored, algorithm, 32)
    (batch,) = pack(weighed, max_tokens=16, num_ranks=1)
    metrics = trainer.forward_backward(batch, algorithm, denominators)
    assert metrics["loss/total"].value == pytest.approx(metrics["distill/divergence"].value, rel=1e-6)
    return metrics["loss/total"].value


@pytest.mark.parametrize("top_k", [None, K])
@pytest.mark.parametrize("chunk_tokens", [6, 4096])
def test_a_trainer_has_the_divergence_of_whole_logits(
    teacher: TeacherModel,
    tiny_model_dir: Path,
    tiny_teacher_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    top_k: int | None,
    chunk_tokens: int,
):
    """However few tokens a chunk has: 6 of logits are one of a divergence."""
    trainer = trainer_of(tiny_model_dir)
    size = trainer.module.model.config.vocab_size
    monkeypatch.setattr(token_model, "_CHUNK_BYTES", 4 * chunk_tokens * size)
    found = divergence(trainer, teacher, {"beta": 0.3, "temperature": 0.8, "top_k": top_k})
    expected = []
    for sample in samples():
        ours, theirs = (logits_before(path, sample) / 0.8 for path in (tiny_model_dir, tiny_teacher_dir))
        if top_k is None:
            pair = [torch.log_softmax(each, -1) for each in (ours, theirs)]
        else:
            pair = [with_tail(each, theirs.topk(top_k).indices) for each in (ours, theirs)]
        expected.append(generalized_jsd(pair[0], pair[1], 0.3))
    assert found == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)


@pytest.mark.parametrize("top_k", [None, K])
def test_a_teacher_whose_embedding_is_padded_to_another_size_is_compared_on_the_tokens_of_both(
    tiny_model_dir: Path, tiny_teacher_dir: Path, tmp_path: Path, top_k: int | None
):
    """The rows of the padding have large logits, as rows that nobody has trained may."""
    padded = AutoModelForCausalLM.from_pretrained(tiny_teacher_dir)
    size = padded.config.vocab_size
    padded.resize_token_embeddings(size + 24)
    with torch.no_grad():
        padded.get_input_embeddings().weight[size:] = padded.get_input_embeddings().weight[5] * 1.5
    padded.save_pretrained(tmp_path)
    block = ModelBlock(path=str(tmp_path))
    divergences = []
    for model in (ModelBlock(path=str(tiny_teacher_dir)), block):
        teacher = TeacherModel(model, gpus=0, num_threads=1, seed=0, tokens_of=ModelBlock(path=str(tiny_model_dir)))
        divergences.append(divergence(trainer_of(tiny_model_dir), teacher, {"top_k": top_k}))
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-5)


def test_sixteen_bit_numbers_travel_as_they_are():
    numbers = torch.tensor([1.5, -3e38, 1e-30]).to(torch.bfloat16)
    bits = to_numpy(numbers)
    assert bits.dtype == np.uint16
    assert torch.equal(to_tensor(bits, "bfloat16", "cpu"), numbers)


def test_numbers_that_are_not_finite_are_refused_by_name(teacher: TeacherModel):
    with torch.no_grad():
        teacher.module.model.model.norm.weight.fill_(torch.nan)
    for verb in (teacher.logprobs, teacher.hidden_states, lambda batch: teacher.top_logprobs(batch, K, 1.0)):
        with pytest.raises(ValueError, match=r"the teacher's .* are not finite"):
            verb(packed())


@pytest.mark.parametrize(
    ("longest", "options", "says"),
    [
        (4096, {}, "sequences may have 4096 tokens, and teacher at .* takes 4096, one of them its own"),
        (32, {"served_model": "larger"}, "serves teacher, not larger"),
    ],
)
def test_a_server_that_cannot_be_the_teacher_is_refused_when_the_run_starts(
    served: tuple[TeacherStandIn, str], tiny_model_dir: Path, longest: int, options: dict[str, str], says: str
):
    with pytest.raises(ValueError, match=says):
        client(served[1], tiny_model_dir, longest, **options).ready()


def test_a_server_of_another_tokenizer_is_refused(served: tuple[TeacherStandIn, str], tiny_model_dir: Path):
    stand_in, url = served
    stand_in.tokenizer = build_character_tokenizer(CHARACTERS[::-1])
    with pytest.raises(ValueError, match="has another tokenizer than"):
        client(url, tiny_model_dir).ready()
    stand_in.has_tokenize = False
    client(url, tiny_model_dir).ready()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda choice: {**choice, "prompt_token_ids": choice["prompt_token_ids"][::-1]}, "has read other token ids"),
        (lambda choice: {**choice, "prompt_logprobs": None}, "no prompt_logprobs in the answer"),
        (
            lambda choice: {**choice, "prompt_logprobs": choice["prompt_logprobs"][:-1]},
            r"prompt_logprobs for \d+ tokens",
        ),
        (
            lambda choice: {
                **choice,
                "prompt_logprobs": [at and {"0": {"logprob": -1}} for at in choice["prompt_logprobs"]],
            },
            "or of other ids",
        ),
    ],
)
def test_an_answer_to_something_else_is_an_error(
    served: tuple[TeacherStandIn, str], tiny_model_dir: Path, change, says
):
    stand_in, url = served
    asked = client(url, tiny_model_dir)
    asked.ready()
    stand_in.change = change
    with pytest.raises(ServerError, match=says):
        asked.logprobs(packed())


def test_a_server_that_is_busy_is_asked_again_and_one_that_hangs_is_left(
    served: tuple[TeacherStandIn, str], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http_calls, "FIRST_PAUSE_S", 0.001)
    stand_in, url = served
    asked = client(url, tiny_model_dir, timeout_s=0.2, requests_at_once=1)
    asked.ready()
    stand_in.failures = 2
    assert asked.logprobs(packed()).any()
    stand_in.delay_s = 1.0
    with pytest.raises(ServerError, match=r"no answer within 0.2 s: raise teacher\.timeout_s"):
        asked.logprobs(packed())


def test_a_server_that_gives_fewer_tokens_than_asked_for_says_so(
    served: tuple[TeacherStandIn, str], tiny_model_dir: Path
):
    stand_in, url = served
    asked = client(url, tiny_model_dir)
    asked.ready()
    with pytest.raises(ServerError, match="greater than 20"):
        asked.top_logprobs(packed(), 21, 1.0)
    stand_in.change = lambda choice: {
        **choice,
        "prompt_logprobs": [
            at and dict(list(at.items())[:2]) for at in stand_in.choice(stand_in.bodies[-1])["prompt_logprobs"]
        ],
    }
    with pytest.raises(ServerError, match=r"algorithm.distill.top_k asks|other ids"):
        asked.top_logprobs(packed(), K, 1.0)


@pytest.mark.parametrize(
    ("logprob", "says"),
    [
        (float("nan"), "logprobs of teacher are not finite"),
        (None, "logprobs of teacher are not finite"),
        (0.5, "0.5 is no logprob, which is at most 0"),
        ("x", "a form that is not known here .*could not convert"),
    ],
)
def test_what_is_no_logprob_is_refused_with_the_servers_address(
    served: tuple[TeacherStandIn, str], tiny_model_dir: Path, logprob: object, says: str
):
    stand_in, url = served
    asked = client(url, tiny_model_dir)
    asked.ready()
    stand_in.change = lambda choice: {
        **choice,
        "prompt_logprobs": [at and {id: {"logprob": logprob} for id in at} for at in choice["prompt_logprobs"]],
    }
    for ask in (asked.logprobs, lambda batches: asked.top_logprobs(batches, K, 1.0)):
        with pytest.raises(ServerError, match=f"{url}/v1/completions: .*{says}"):
            ask(packed())


@pytest.mark.parametrize("choice", ["text", None, {"prompt_logprobs": [None, {"three": {"logprob": -1.0}}]}])
def test_an_answer_of_another_form_is_shown(served: tuple[TeacherStandIn, str], tiny_model_dir: Path, choice: object):
    stand_in, url = served
    asked = client(url, tiny_model_dir)
    asked.ready()
    stand_in.change = lambda _: choice
    with pytest.raises(ServerError, match=f"{url}/v1/completions: it answered in a form that is not known here"):
        asked.logprobs(packed())
