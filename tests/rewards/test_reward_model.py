"""A reward model's scores are those of transformers' own forward pass, one conversation at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlflow.actors import reward_pool
from rlflow.actors.reward_server import RewardServer
from rlflow.data.errors import RowError
from rlflow.recipe import RewardBlock
from rlflow.rewards import RewardError, resolve
from rlflow.rewards.reward_model import score_head_problem
from rlflow.rewards.score_batch import GroupTexts
from rlflow.types import Prompt

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,?:\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPTS = [[{"role": "user", "content": text}] for text in ("What is two and two?", "Name a colour.", "Hi", "Hi")]
COMPLETIONS = ["four", "blue, and a much longer answer than that of the others", "", "Hello"]
PAD, EOS = 0, 1


@pytest.fixture(scope="session")
def reward_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 classifier of hidden size 32, whose weights are large enough for scores to differ."""
    import torch
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from rlflow.data.tokenizer import build_character_tokenizer

    directory = tmp_path_factory.mktemp("reward_model")
    tokenizer = build_character_tokenizer(CHARACTERS, CHAT_TEMPLATE)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.5,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForSequenceClassification(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def copied(reward_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reward_model_dir, tmp_path / "copy"))


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def score(path: Path, prompts: Any = PROMPTS, completions: Any = COMPLETIONS, **args: Any) -> list[float]:
    function = resolve(RewardBlock(name="reward_model", args={"path": str(path), **args}))
    return function(prompts, completions, [[]] * len(completions))


def conversation_ids(path: Path, prompt: list[dict[str, str]], completion: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    messages = [*prompt, {"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(messages, return_dict=False)


def forward_alone(path: Path, rows: list[list[int]], attention: str | None = None) -> list[float]:
    """What transformers says of each row, without padding."""
    import torch
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention}
    model = AutoModelForSequenceClassification.from_pretrained(path, **options).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in rows]


@pytest.mark.parametrize("pad", [PAD, EOS, None], ids=["a pad token", "pad is eos", "no pad token"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_padding_changes_no_score_whatever_the_pad_token(copied: Path, pad: int | None, batch_size: int) -> None:
    change_config(copied, pad_token_id=pad)
    rows = [conversation_ids(copied, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert len({len(row) for row in rows}) == 4
    assert all(row[-1] == EOS for row in rows)
    expected = forward_alone(copied, rows)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(score(copied, batch_size=batch_size), expected, atol=1e-5)


def test_a_cap_on_attentions_logits_is_not_left_out(copied: Path) -> None:
    """As transformers' default attention leaves out that of Gemma 2."""
    import torch
    from transformers import Gemma2Config, Gemma2ForSequenceClassification

    config = Gemma2Config(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=1,
        attn_logit_softcapping=1.0,
        initializer_range=0.5,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma2ForSequenceClassification(config).save_pretrained(copied)
    rows = [conversation_ids(copied, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected, uncapped = forward_alone(copied, rows, "eager"), forward_alone(copied, rows, "sdpa")
    assert np.abs(np.subtract(expected, uncapped)).max() > 1e-2
    np.testing.assert_allclose(score(copied), expected, atol=1e-5)


def test_an_overlong_conversation_loses_the_beginning_of_its_prompt(reward_model_dir: Path) -> None:
    prompt = [{"role": "user", "content": "abc" * 20}]
    ids = conversation_ids(reward_model_dir, prompt, "the answer")
    expected = forward_alone(reward_model_dir, [ids[-30:]])
    scores = score(reward_model_dir, [prompt], ["the answer"], max_tokens=30)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    other_start = [{"role": "user", "content": "xyz" + "abc" * 19}]
    assert score(reward_model_dir, [other_start], ["the answer"], max_tokens=30) == scores
    assert abs(score(reward_model_dir, [prompt], ["the answes"], max_tokens=30)[0] - scores[0]) > 1e-3


def test_without_max_tokens_a_conversation_is_cut_to_the_models_positions_and_more_are_refused(copied: Path) -> None:
    change_config(copied, max_position_embeddings=30)
    prompt = [{"role": "user", "content": "abc" * 20}]
    ids = conversation_ids(copied, prompt, "the answer")
    expected = forward_alone(copied, [ids[-30:]])
    np.testing.assert_allclose(score(copied, [prompt], ["the answer"]), expected, atol=1e-5)
    with pytest.raises(RewardError, match=r"takes 30 tokens, and args\.max_tokens is 31: lower it to 30"):
        score(copied, max_tokens=31)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(copied: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(copied)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(copied)
    with pytest.raises(RewardError, match=f"an embedding of {len(tokenizer) - 1} rows, and its tokenizer ids up to"):
        score(copied)


def test_without_a_chat_template_the_texts_are_put_end_to_end(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    expected = forward_alone(copied, [[vocabulary[character] for character in "Name a colour.blue"]])
    np.testing.assert_allclose(score(copied, PROMPTS[1:2], ["blue"]), expected, atol=1e-5)


def test_a_half_precision_model_is_run_in_float32(copied: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(copied, dtype=torch.bfloat16).save_pretrained(copied)
    rows = [conversation_ids(copied, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    np.testing.assert_allclose(score(copied), forward_alone(copied, rows), atol=1e-5)


def test_a_character_that_the_model_does_not_know_is_an_error(reward_model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"the character 'é' is not in model\.characters"):
        score(reward_model_dir, PROMPTS[:1], ["é"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "has no score head, it is a Qwen3ForCausalLM: train one with"),
        ({"architectures": None}, "it is a model of no named architecture"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "has a score head of 3 labels, a reward model's has one"),
        ({"id2label": None}, "has a score head of 2 labels"),
    ],
)
def test_a_model_without_a_score_head_of_one_label_is_refused(
    copied: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(copied, **changes)
    with pytest.raises(RewardError, match=f"^reward_model: {copied} .*{message}"):
        score(copied)


def test_a_model_whose_head_was_not_saved_is_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"it lacks score\.weight"):
        score(copied)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"path": "/no/such/directory"}, "there is no directory /no/such/directory: give one with config.json"),
        ({"path": "organisation/model"}, "organisation/model cannot be loaded .* a hub id that this machine can reach"),
        ({"path": "organisation/model", "max_token": 5}, "did you mean 'max_tokens'"),
        ({"path": "organisation/model", "batch_size": 0}, "batch_size is 0: give a whole number above 0"),
        ({}, "needs args: path"),
    ],
)
def test_a_wrong_argument_is_an_error_that_says_what_to_do(args: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        resolve(RewardBlock(name="reward_model", args=args))


def test_a_directory_without_tokenizer_is_an_error_that_names_it(copied: Path) -> None:
    for file in copied.glob("*token*"):
        file.unlink()
    with pytest.raises(RewardError, match=f"reward_model: {copied} has no tokenizer: save the one"):
        score(copied)


def test_a_batch_beyond_memory_says_which_keys_to_change(
    reward_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = resolve(RewardBlock(name="reward_model", args={"path": str(reward_model_dir)}))

    def refuse(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("rlflow.rewards.reward_model.RewardModel._score", refuse)
    with pytest.raises(RewardError, match=r"scoring ran out of memory: raise reward_server\.memory_gib, or lower args"):
        function(PROMPTS, COMPLETIONS, [[]] * 4)


@pytest.mark.slow
def test_a_reward_child_loads_the_model_before_its_first_call_and_scores_by_it(reward_model_dir: Path) -> None:
    """Importing torch alone takes longer than the deadline of a call."""
    args = {"path": str(reward_model_dir), "batch_size": 2}
    server = RewardServer([RewardBlock(name="reward_model", args=args, timeout_s=2.0)], 1)
    texts = ("four", "five, I think", "", "4")
    groups = [
        GroupTexts(
            Prompt(f"set:{i}", np.zeros(1, np.int32), PROMPTS[i], {"level": i}), texts[2 * i : 2 * i + 2], (b"",) * 2
        )
        for i in range(2)
    ]
    try:
        server.ready()
        scores = server.score(groups)
    finally:
        server.close()
    rows = [conversation_ids(reward_model_dir, PROMPTS[i // 2], text) for i, text in enumerate(texts)]
    assert scores.errors == ()
    np.testing.assert_allclose(scores.rewards["reward_model"], forward_alone(reward_model_dir, rows), atol=1e-5)


@pytest.mark.parametrize(
    ("memory_gib", "message"),
    [
        (0.3, r"^reward_model: .* needs 0\.50 GiB before .* allocate 0\.30 GiB: raise reward_server\.memory_gib$"),
        (0.08, r"^a reward process .* \(.*\); if it was short of memory, raise reward_server\.memory_gib$"),
    ],
)
def test_a_model_that_a_child_cannot_hold_is_an_error_that_names_the_key(
    reward_model_dir: Path, memory_gib: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_pool, "START_TIMEOUT_S", 15.0)
    block = RewardBlock(name="reward_model", args={"path": str(reward_model_dir)})
    server = RewardServer([block], 1, memory_gib=memory_gib)
    try:
        with pytest.raises(RewardError, match=message):
            server.ready()
    finally:
        server.close()


def test_the_module_is_imported_without_torch_and_transformers() -> None:
    program = "import sys, rewards.reward_model; print({'torch', 'transformers'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_labels": 1}, None),
        ({"id2label": {"0": "score"}}, None),
        ({}, "has a score head of 2 labels"),
        ({"num_labels": 3, "id2label": {"0": "score"}}, "has a score head of 3 labels"),
        ({"architectures": ["LlamaForCausalLM"], "num_labels": 1}, "has no score head, it is a LlamaForCausalLM"),
    ],
)
def test_a_reward_model_has_a_score_head_of_one_label(fields: dict, problem: str | None) -> None:
    said = score_head_problem({"architectures": ["LlamaForSequenceClassification"], **fields})
    assert said is None if problem is None else str(said).startswith(problem)


def test_a_reward_model_reads_no_pictures_and_says_so(copied: Path) -> None:
    """A picture would reach a template of texts as a list of parts."""
    seen = [{"role": "user", "content": "<image>What?", "images": 1}]
    with pytest.raises(RowError, match="its prompt has pictures, and a reward model here reads text alone"):
        score(copied, [seen], ["four"])
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"vision_config": {}}))
    with pytest.raises(RewardError, match="is a vision-language model, and this reward scores text alone"):
        score(copied)
