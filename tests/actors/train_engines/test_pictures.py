"""Vision-language models in trainers: packed, with pictures or without, against transformers one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification

from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.sequence_trainer import SequenceTrainer
from rlflow.actors.train_engines import tower
from rlflow.actors.train_engines.scalar_model import load_scalar_model
from rlflow.actors.train_engines.token_model import TokenModel, load_token_model, score
from rlflow.actors.vision import classifier_class, part_finder
from rlflow.batching import pack
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.images import decode
from rlflow.data.video_archive import is_video, unpack
from rlflow.recipe import ModelBlock, TrainerBlock, algorithm_of
from rlflow.recipe.model_blocks import Part
from rlflow.types import Denominators, Sample
from tests.seeing_models import FAMILIES, NEEDS_TORCHVISION, write_seeing_model
from tests.vision_models import picture, video

CPU = torch.device("cpu")
ALL: tuple[Part, ...] = ("language", "projector", "vision")
IMAGES = ((picture(40, 24, 1),), (), (picture(20, 20, 2), picture(64, 40, 3)), (picture(40, 24, 1),), ())
VIDEOS = (
    *((picture(40, 24, 1), video(16, 16, 3, 2)), (), (picture(20, 20, 2), picture(64, 40, 3))),
    *((video(40, 24, 2, 1), video(24, 16, 5, 3)), ()),
)


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp(request.param), request.param)


def samples_of(directory: Path) -> list[Sample]:
    """Sequences with a picture, with none, with two, with a video where the model takes some; each trained behind its
    pictures."""
    processor = ImageProcessor(str(directory))
    generator, samples = np.random.default_rng(0), []
    for images in VIDEOS if processor.takes_videos else IMAGES:
        text = generator.integers(60, 260, 12)
        tokens = [processor.video_token_id if is_video(image) else processor.image_token_id for image in images]
        ids = np.insert(text, [2 + 3 * i for i in range(len(images))], tokens).astype(np.int32)
        ids = processor.expand(ids, images)
        mask = np.arange(len(ids)) >= len(ids) - 5
        weights = np.where(mask, generator.uniform(0.1, 1, len(ids)), 0).astype(np.float32)
        samples.append(Sample(ids, mask, weights, images=images))
    return samples


def inputs_of(directory: Path, sample: Sample) -> dict[str, torch.Tensor]:
    """What transformers' own processor makes of all of a sequence's pictures, for its forward pass."""
    vision = ImageProcessor(str(directory))
    processor = vision.processor
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(sample.token_ids).long()[None]}
    if not sample.images:
        return inputs
    pictures = [decode(image) for image in sample.images if not is_video(image)]
    videos = [unpack(image) for image in sample.images if is_video(image)]
    text = "".join(processor.video_token if is_video(image) else processor.image_token for image in sample.images)
    of_videos = {
        "videos": [[decode(frame) for frame in video.frames] for video in videos],
        "video_metadata": [
            [{"total_num_frames": v.num_frames, "fps": v.fps, "frames_indices": [*v.indices]}] for v in videos
        ],
        "do_sample_frames": False,
    }
    made = processor(
        text=[text], images=[pictures] if pictures else None, return_tensors="pt", **(of_videos if videos else {})
    )
    inputs |= {name: made[name] for name in made if name.startswith(("pixel", "image", "video", "second"))}
    if vision.takes_videos:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == processor.image_token_id) + 2 * (ids == processor.video_token_id)
    return inputs


@torch.no_grad()
def plain_logprobs(directory: Path, sample: Sample) -> np.ndarray:
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    logits = model(**inputs_of(directory, sample)).logits[0, :-1]
    ids = torch.from_numpy(sample.token_ids[1:]).long()
    logprobs = torch.log_softmax(logits, -1).gather(1, ids[:, None]).squeeze(1).numpy()
    return np.where(sample.loss_mask, np.append(0, logprobs), 0)


def trainer_of(directory: Path, train: tuple[Part, ...], kind: Any = PolicyTrainer, **options: Any) -> Any:
    model = ModelBlock(path=str(directory), train=train, learning_rates=options.pop("learning_rates", {}))
    block = TrainerBlock(learning_rate=1e-2, tokens_per_micro_batch=4096, **options)
    own = {} if kind is PolicyTrainer else {"algorithm": algorithm_of("reward_model")}
    trainer = kind(model, block, rank=0, world_size=1, num_threads=1, seed=0, **own)
    trainer.setup(None)
    return trainer


def gradients(directory: Path, max_tokens: int, **options: Any) -> dict[str, torch.Tensor]:
    trainer = trainer_of(directory, ALL, **options)
    (batches,) = pack(samples_of(directory), max_tokens=max_tokens, num_ranks=1)
    trainer.forward_backward(batches, algorithm_of("sft"), Denominators(25, 5, 5))
    return {name: parameter.grad for name, parameter in trainer.module.model.named_parameters()}


def test_packed_logprobs_are_those_of_transformers_of_each_sequence_alone(seeing: Path):
    samples = samples_of(seeing)
    module = load_token_model(ModelBlock(path=str(seeing)), seed=0, device=CPU)
    (batches,) = pack(samples, max_tokens=4096, num_ranks=1)
    assert len(batches) == 1
    expected = np.concatenate([plain_logprobs(seeing, sample) for sample in samples])
    assert np.abs(score(module, list(batches), CPU, 1.0) - expected).max() < 1e-5
    other = [Sample(s.token_ids, s.loss_mask, s.loss_weights, images=s.images[::-1]) for s in samples]
    (swapped,) = pack(other, max_tokens=4096, num_ranks=1)
    assert np.abs(score(module, list(swapped), CPU, 1.0) - expected).max() > 1e-3


def test_scores_of_a_reward_model_are_those_of_the_classifier_that_it_writes(seeing: Path, tmp_path: Path):
    trainer = trainer_of(seeing, ("language",), SequenceTrainer)
    torch.nn.init.normal_(trainer.module.model.score.weight)
    trainer.export(tmp_path)
    samples = samples_of(seeing)
    (batches,) = pack(samples, max_tokens=4096, num_ranks=1)
    with torch.no_grad():
        (scores,) = (trainer.module(batch, CPU, "scores") for batch in batches)
    classifier_class(trainer.module.model.config)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = [float(model(**inputs_of(seeing, sample)).logits) for sample in samples]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    loaded = load_scalar_model(ModelBlock(path=str(tmp_path)), seed=0, device=CPU)
    assert torch.equal(loaded.model.score.weight, model.score.weight)


def test_no_split_into_micro_batches_and_no_recomputation_changes_a_gradient(seeing: Path):
    """Micro-batches without pictures among them."""
    whole = gradients(seeing, 4096)
    for split in (gradients(seeing, 16), gradients(seeing, 4096, gradient_checkpointing=True)):
        for name, gradient in whole.items():
            assert gradient is not None, name
            assert (split[name] - gradient).norm() < 1e-5 * max(1.0, gradient.norm()), name
    assert all(float(whole[name].norm()) > 0 for name in whole if "visual.patch_embed.proj.weight" in name)


def test_parts_that_are_not_trained_stay_and_others_have_learning_rates_of_their_own(seeing: Path):
    """Adam's first step is the learning rate, whatever the gradient."""
    trainer = trainer_of(seeing, ("language", "projector"), learning_rates={"projector": 1e-3})
    model = trainer.module.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (batches,) = pack(samples_of(seeing), max_tokens=4096, num_ranks=1)
    trainer.forward_backward(batches, algorithm_of("sft"), Denominators(25, 5, 5))
    trainer.optim_step(1e-2)
    part_of, moved = part_finder(model), dict.fromkeys(ALL, 0.0)
    for name, parameter in model.named_parameters():
        moved[part_of(name)] = max(moved[part_of(name)], float((parameter.detach() - before[name]).abs().max()))
    assert moved == {"language": pytest.approx(1e-2, rel=1e-3), "projector": pytest.approx(1e-3, rel=1e-3), "vision": 0}


def test_batches_without_a_picture_leave_every_trained_parameter_a_gradient_of_zero(seeing: Path):
    trainer = trainer_of(seeing, ALL)
    text = [sample for sample in samples_of(seeing) if not sample.images]
    (batches,) = pack(text, max_tokens=4096, num_ranks=1)
    trainer.forward_backward(batches, algorithm_of("sft"), Denominators(10, 2, 2))
    part_of = part_finder(trainer.module.model)
    of_tower = {n: p.grad for n, p in trainer.module.model.named_parameters() if part_of(n) != "language"}
    assert all(gradient is not None and not gradient.any() for gradient in of_tower.values())


def test_ranks_run_the_tower_as_often_whatever_their_micro_batches_hold(seeing: Path):
    """For pictures and for videos each, where the model takes some; and no gradient changes by that."""
    whole = gradients(seeing, 4096)
    trainer = trainer_of(seeing, ALL)
    tower, model = trainer.module.tower, trainer.module.model
    tower.run_always()
    runs: list[int] = []
    model.get_encoder(modality="image").register_forward_hook(lambda *_: runs.append(1))
    passes = []
    for sample in samples_of(seeing):
        (batches,) = pack([sample], max_tokens=4096, num_ranks=1)
        before = len(runs)
        trainer.forward_backward(batches, algorithm_of("sft"), Denominators(25, 5, 5))
        passes.append(len(runs) - before)
    assert passes == [2 if tower.processor.takes_videos else 1] * len(passes)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - whole[name]).norm() < 1e-5 * max(1.0, whole[name].norm()), name


@NEEDS_TORCHVISION
def test_videos_of_a_model_whose_positions_are_not_as_it_was_made_are_refused(tmp_path: Path):
    """Four steps of a second and four positions each, 2 x 2 tokens; transformers has the text behind them at 4."""
    module = load_token_model(ModelBlock(path=str(write_seeing_model(tmp_path, "qwen2_5_vl"))), seed=0, device=CPU)
    assert module.tower is not None and not module.tower.problem
    processor = module.tower.processor
    clip = (video(16, 16, 8, 1),)
    ids = processor.expand(np.array([70, 71, processor.video_token_id, 72, 73], dtype=np.int32), clip)
    positions = module.tower.read(ids, np.array([0, len(ids)]), [clip], CPU).position_ids
    assert positions is not None
    assert positions[1].tolist() == [0, 1, *(2,) * 4, *(6,) * 4, *(10,) * 4, *(14,) * 4, 4, 5]
    sample = Sample(ids, np.arange(len(ids)) > 17, np.ones(len(ids), np.float32), images=clip)
    (batches,) = pack([sample], max_tokens=99, num_ranks=1)
    with pytest.raises(ValueError, match="videos are not supported: transformers gives the text behind a video"):
        score(module, list(batches), CPU, 1.0)


def test_pictures_whose_numbers_are_not_those_of_transformers_are_refused_by_name(
    seeing: Path, monkeypatch: pytest.MonkeyPatch
):
    """Text is trained all the same, but with a tower that is to be trained."""
    joined = tower.joined
    monkeypatch.setattr(tower, "joined", lambda parts: joined(parts[::-1]))
    module = load_token_model(ModelBlock(path=str(seeing)), seed=0, device=CPU)
    samples = samples_of(seeing)
    assert np.isfinite(score(module, list(pack([samples[1]], max_tokens=99, num_ranks=1)[0]), CPU, 1.0)).all()
    refusal = "ForConditionalGeneration: pictures are not supported: packed"
    with pytest.raises(ValueError, match=refusal):
        score(module, list(pack(samples, max_tokens=4096, num_ranks=1)[0]), CPU, 1.0)
    with pytest.raises(ValueError, match=refusal):
        load_token_model(ModelBlock(path=str(seeing), train=ALL), seed=0, device=CPU)


def test_positions_that_are_not_those_of_the_model_are_refused(seeing: Path, monkeypatch: pytest.MonkeyPatch):
    if "qwen" not in seeing.name:
        pytest.skip("its positions have one dimension")
    flat = lambda self, ids, types, arrays: torch.arange(len(ids)).expand(4, -1)  # noqa: E731
    monkeypatch.setattr(tower.Tower, "_positions", flat)
    module = load_token_model(ModelBlock(path=str(seeing)), seed=0, device=CPU)
    assert "packed with pictures, its numbers differ from those of transformers" in module.tower.problem


def test_a_model_that_reads_text_alone_refuses_pictures_and_has_no_tower_to_train(tiny_model_dir: Path):
    module: TokenModel = load_token_model(ModelBlock(path=str(tiny_model_dir)), seed=0, device=CPU)
    mask = np.array([False, False, True, True])
    sample = Sample(np.arange(4, dtype=np.int32), mask, np.ones(4, np.float32), images=IMAGES[0])
    (batches,) = pack([sample], max_tokens=4096, num_ranks=1)
    with pytest.raises(ValueError, match="the model reads text alone: name a vision-language model"):
        score(module, list(batches), CPU, 1.0)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no part called vision: it has language"):
        load_token_model(ModelBlock(path=str(tiny_model_dir), train=("language", "vision")), seed=0, device=CPU)
