"""Models that hear in trainers: packed, with recordings or without, against transformers one at a time."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, Gemma3nConfig, GraniteSpeechConfig, Qwen2AudioConfig

import rlflow
from rlflow.actors.policy_trainer import PolicyTrainer
from rlflow.actors.rollout_engines.torch_engine import TorchEngine
from rlflow.actors.train_engines import tower
from rlflow.actors.train_engines.token_model import load_token_model, score
from rlflow.actors.vision import hears, language_model_class, part_finder
from rlflow.batching import pack
from rlflow.cli.main import main
from rlflow.data.examples import Example, load_examples
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import ModelBlock, TrainerBlock, algorithm_of
from rlflow.recipe.data_blocks import DataBlock
from rlflow.recipe.model_blocks import Part
from rlflow.types import Denominators, Sample
from tests.hearing_models import FAMILIES, OTHERS, recording, write_hearing_model
from tests.local_actors import use_local_actors

CPU = torch.device("cpu")
ALL: tuple[Part, ...] = ("language", "projector", "audio")
ROWS: dict[str, list[list[float]]] = {
    "qwen2_audio": [[0.3], [], [0.5, 1.4], [2.0]],
    "audioflamingo3": [[0.3], [], [2.7, 0.4], [4.1]],
}
"""Family -> seconds of each row's recordings: Audio Flamingo 3 hears one window of two seconds after another."""


@pytest.fixture(scope="module", params=FAMILIES)
def hearing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_hearing_model(tmp_path_factory.mktemp(request.param), request.param)
    rows: list[dict[str, Any]] = []
    for number, seconds in enumerate(ROWS[request.param]):
        names = [f"{number}.{index}.wav" for index in range(len(seconds))]
        for index, name in enumerate(names):
            (directory / name).write_bytes(recording(seconds[index], 10 * number + index))
        question = f"{'<audio>, then '.join(['What is '] * len(seconds))}<audio>?" if seconds else "Who is there?"
        answer = {"role": "assistant", "content": f"a sound, {number}"}
        rows.append({"messages": [{"role": "user", "content": question}, answer], "audios": names})
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def examples_of(directory: Path) -> list[Example]:
    model = ModelBlock(path=str(directory))
    data = DataBlock.model_validate({"train": {"path": str(directory / "rows.jsonl")}, "max_tokens": 500})
    return load_examples(data, load_tokenizer(model), 0, ImageProcessor(str(directory)))


def samples_of(directory: Path) -> list[Sample]:
    return [
        Sample(item.token_ids, item.loss_mask, item.loss_mask.astype(np.float32), images=item.images)
        for item in examples_of(directory)
    ]


@torch.no_grad()
def plain_logprobs(directory: Path) -> list[tuple[list[int], np.ndarray]]:
    """Of each row, by nothing but transformers: token ids, and the logprob of each, 0 for the first."""
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    outputs = []
    for row in map(json.loads, (directory / "rows.jsonl").read_text().splitlines()):
        question, answer = row["messages"]
        pieces = question["content"].split("<audio>")
        parts = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            parts += [{"type": "audio", "audio_url": ""}, {"type": "text", "text": piece}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}, answer], tokenize=False)
        sounds = []
        for name in row["audios"]:
            with wave.open(io.BytesIO((directory / name).read_bytes())) as file:
                sounds.append(np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768)
        inputs: Any = None
        if len(sounds) < 2 or "Flamingo" not in type(processor).__name__:
            inputs = processor(text=[text], audio=sounds or None, sampling_rate=16_000, return_tensors="pt")
        else:
            # It takes one recording a text: the windows of several are one after another.
            made = [processor(text=["<sound>"], audio=[sound], return_tensors="pt") for sound in sounds]
            before = text.split("<sound>")
            ids = [processor.tokenizer(before[0])["input_ids"]]
            for of_one, piece in zip(made, before[1:], strict=True):
                ids += [of_one["input_ids"][0].tolist(), processor.tokenizer(piece)["input_ids"]]
            inputs = {"input_ids": torch.tensor([[token_id for piece in ids for token_id in piece]])}
            for name in ("input_features", "input_features_mask"):
                inputs[name] = torch.cat([of_one[name] for of_one in made])
        ids = inputs["input_ids"]
        logits = model(**{name: values for name, values in inputs.items() if name != "attention_mask"}).logits[0, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1)
        outputs.append((ids[0].tolist(), np.append(0, logprobs.numpy())))
    return outputs


def test_packed_logprobs_are_those_of_transformers_of_each_row_alone(hearing: Path):
    samples = samples_of(hearing)
    module = load_token_model(ModelBlock(path=str(hearing)), seed=0, device=CPU)
    (batches,) = pack(samples, max_tokens=4096, num_ranks=1)
    assert len(batches) == 1
    plain = plain_logprobs(hearing)
    for sample, (token_ids, _) in zip(samples, plain, strict=True):
        # Behind an answer the template has a line end, which is not trained.
        assert token_ids[: len(sample.token_ids)] == sample.token_ids.tolist()
        assert sample.loss_mask.any()
    rows = [
        np.where(sample.loss_mask, row[: len(sample.token_ids)], 0)
        for sample, (_, row) in zip(samples, plain, strict=True)
    ]
    assert np.abs(score(module, list(batches), CPU, 1.0) - np.concatenate(rows)).max() < 1e-5
    other = [Sample(s.token_ids, s.loss_mask, s.loss_weights, images=s.images[::-1]) for s in samples]
    (swapped,) = pack(other, max_tokens=4096, num_ranks=1)
    assert np.abs(score(module, list(swapped), CPU, 1.0) - np.concatenate(rows)).max() > 1e-3


def trainer_of(directory: Path, **options: Any) -> PolicyTrainer:
    block = TrainerBlock(learning_rate=1e-2, tokens_per_micro_batch=4096, **options)
    model = ModelBlock(path=str(directory), train=ALL, learning_rates={"audio": 1e-3})
    trainer = PolicyTrainer(model, block, rank=0, world_size=1, num_threads=1, seed=0)
    trainer.setup(None)
    return trainer


def gradients(directory: Path, max_tokens: int, **options: Any) -> dict[str, torch.Tensor]:
    trainer = trainer_of(directory, **options)
    (batches,) = pack(samples_of(directory), max_tokens=max_tokens, num_ranks=1)
    trainer.forward_backward(batches, algorithm_of("sft"), Denominators(25, 5, 5))
    named = trainer.module.model.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.requires_grad}


def test_no_split_into_micro_batches_and_no_recomputation_changes_a_gradient(hearing: Path):
    """Micro-batches without recordings among them, in which the tower is run on a filler."""
    whole = gradients(hearing, 4096)
    for split in (gradients(hearing, 16), gradients(hearing, 4096, gradient_checkpointing=True)):
        for name, gradient in whole.items():
            assert gradient is not None, name
            assert (split[name] - gradient).norm() < 1e-5 * max(1.0, gradient.norm()), name
    assert all(float(whole[name].norm()) > 0 for name in whole if "audio_tower.conv1" in name)


def test_batches_without_a_recording_leave_every_trained_parameter_a_gradient_of_zero(hearing: Path):
    trainer = trainer_of(hearing)
    text = [sample for sample in samples_of(hearing) if not sample.images]
    (batches,) = pack(text, max_tokens=4096, num_ranks=1)
    trainer.forward_backward(batches, algorithm_of("sft"), Denominators(10, 2, 2))
    model = trainer.module.model
    part_of = part_finder(model)
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_tower = [gradient for name, gradient in trained.items() if part_of(name) != "language"]
    assert of_tower and all(gradient is not None and not gradient.any() for gradient in of_tower)


@pytest.mark.parametrize("family", OTHERS)
def test_packed_numbers_and_gradients_of_other_architectures_are_those_of_transformers(tmp_path: Path, family: str):
    """By the check of every model that is loaded; Qwen3-ASR's recordings of several lengths are filled up."""
    module = load_token_model(ModelBlock(path=str(write_hearing_model(tmp_path, family))), seed=0, device=CPU)
    assert module.tower is not None and module.tower.name == "recording"
    assert module.passes.packs and not module.tower.problem


def test_recordings_whose_numbers_are_not_those_of_transformers_are_refused_by_name(
    hearing: Path, monkeypatch: pytest.MonkeyPatch
):
    joined = tower.joined
    monkeypatch.setattr(tower, "joined", lambda parts: joined(parts[::-1]))
    module = load_token_model(ModelBlock(path=str(hearing)), seed=0, device=CPU)
    samples = samples_of(hearing)
    assert np.isfinite(score(module, list(pack([samples[1]], max_tokens=99, num_ranks=1)[0]), CPU, 1.0)).all()
    refusal = "ForConditionalGeneration: recordings are not supported: packed"
    with pytest.raises(ValueError, match=refusal):
        score(module, list(pack(samples, max_tokens=4096, num_ranks=1)[0]), CPU, 1.0)
    with pytest.raises(ValueError, match=refusal):
        load_token_model(ModelBlock(path=str(hearing), train=ALL), seed=0, device=CPU)


RECIPE = """
run: {{output_dir: {out}, seed: 3, steps: 2}}
model: {{path: {model}, train: [language, projector, audio], learning_rates: {{audio: 1.0e-4}}}}
algorithm: {{name: {name}}}
data: {{train: {{path: {rows}}}, prompts_per_step: 4, {limit}}}
trainer: {{learning_rate: 1.0e-3, tokens_per_micro_batch: 512}}
tracking: [jsonl]
"""


def recipe_of(hearing: Path, directory: Path, name: str) -> Path:
    rows = [json.loads(line) for line in (hearing / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["audios"] = [str(hearing / file) for file in row["audios"]]
        if name in ("dpo", "reward_model"):
            row["rejected_response"] = "nothing"
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = directory / f"{name}.yaml"
    limit = "max_prompt_tokens: 200" if name == "grpo" else "max_tokens: 500"
    text = RECIPE.format(out=directory / "run", model=hearing, rows=path, name=name, limit=limit)
    recipe.write_text(text + "rewards: [{name: exact_match}]\nrollout: {max_new_tokens: 9}\n" * (name == "grpo"))
    return recipe


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_row_trains_a_model_that_hears(hearing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Every part moves by its own learning rate, and what is written is loaded with its processor."""
    if name != "sft" and "flamingo" in hearing.name:
        pytest.skip("one family shows it")
    use_local_actors(monkeypatch)
    rlflow.run(recipe_of(hearing, tmp_path, name))
    final = tmp_path / "run" / "final"
    before, after = load_file(hearing / "model.safetensors"), load_file(final / "model.safetensors")
    moved = {key: float((after[key].float() - before[key].float()).abs().max()) for key in before if key in after}
    of_tower = [value for key, value in moved.items() if "audio_tower.layers" in key]
    assert 0 < max(of_tower) < 5e-4 < max(moved.values())
    assert AutoProcessor.from_pretrained(final).audio_token == AutoProcessor.from_pretrained(hearing).audio_token
    card = (final / "README.md").read_text()
    assert '{"type": "audio", "audio": "recording.wav"}' in card and "vLLM" not in card
    assert hears(AutoModelForSeq2SeqLM.from_pretrained(final).config)


def test_nothing_is_asked_of_a_model_that_hears_and_a_plan_says_so(
    hearing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = tmp_path / "rows.jsonl"
    for arguments, reason in (
        (["plan", str(recipe_of(hearing, tmp_path, "grpo"))], "the model hears, and no rollout engine writes from"),
        (
            ["infer", str(hearing), "--data", str(rows), "--output", str(tmp_path / "a.jsonl")],
            "hears, and no rollout engine writes from recordings",
        ),
        (["plan", str(recipe_of(hearing, tmp_path, "reward_model"))], "hears, and transformers reads no head beside"),
        (["export", str(hearing), str(tmp_path / "new"), "--quantize", "fp8"], "has a tower beside its language model"),
    ):
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match=" hears, and no rollout engine writes from recordings"):
        TorchEngine(str(hearing), dtype="float32", max_num_seqs=1)
    assert main(["plan", str(recipe_of(hearing, tmp_path, "sft"))]) == 0
    assert "4 rows with 4 recordings, " in capsys.readouterr().out


def test_models_that_also_see_are_none_that_hear(hearing: Path):
    assert hears(Qwen2AudioConfig()) and not hears(Gemma3nConfig())
    with pytest.raises(
        ValueError, match="granite_speech is of encoder_config, projector_config, text_config, and models"
    ):
        language_model_class(GraniteSpeechConfig())
    model = load_token_model(ModelBlock(path=str(hearing)), seed=0, device=CPU).model
    found = {part_finder(model)(name) for name, _ in model.named_parameters()}
    assert found == set(ALL)
