"""Ids and positions that a recipe's models do not know are refused by its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from rlflow.cli.preflight import load_checked
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.recipe import RecipeError

CHARACTERS = "0123456789+="
"""With pad and eos 14 tokens."""
RECIPE = """\
algorithm: {name: grpo}
model: {path: policy}
data: {train: {generator: arithmetic}, max_prompt_tokens: 16}
rewards: [{name: exact_match}]
rollout: {max_new_tokens: 6}
run: {steps: 1, output_dir: out}
"""
PPO = "algorithm={name: ppo, critic: {path: other}}"


def write_model(
    directory: Path, characters: str | None = CHARACTERS, added: tuple[str, ...] = (), **config: Any
) -> None:
    """Files of a model, without weights that anybody could load."""
    directory.mkdir(exist_ok=True)
    given = {"vocab_size": 64, "max_position_embeddings": 64, "architectures": ["Qwen3ForCausalLM"], **config}
    (directory / "config.json").write_text(json.dumps(given))
    save_file({}, directory / "model.safetensors")
    if characters is not None:
        tokenizer = build_character_tokenizer(characters)
        tokenizer.add_tokens(list(added))
        tokenizer.save_pretrained(directory)


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "policy")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load_checked(path, overrides)
    return [str(problem) for problem in raised.value.problems]


@pytest.mark.parametrize(
    ("override", "key"), [("reference.path=other", "reference.path"), (PPO, "algorithm.critic.path")]
)
def test_a_model_that_scores_the_policys_ids_and_has_another_tokenizer_is_refused(
    recipe_file: Path, override: str, key: str
):
    here = recipe_file.parent
    write_model(here / "other", characters="=+9876543210")
    (problem,) = problems_of(recipe_file, override)
    assert problem == (
        f"command line: {key}: {here}/other has another tokenizer than {here}/policy, whose ids it is to score: 12 of "
        "its 14 tokens have another id or none: '0' is 2 here and 13 there. Name a model of the same tokenizer"
    )


def test_a_token_that_the_policy_alone_has_makes_it_another_tokenizer_and_one_that_it_lacks_does_not(
    recipe_file: Path,
):
    here = recipe_file.parent
    write_model(here / "other", added=("<think>",))
    assert load_checked(recipe_file, ["reference.path=other"])
    write_model(here / "policy", added=("<think>", "<answer>"))
    (problem,) = problems_of(recipe_file, "reference.path=other")
    assert "1 of its 16 tokens have another id or none: '<answer>' is 15 here and missing there" in problem


def test_the_same_tokenizer_as_another_version_of_transformers_writes_it_is_accepted(recipe_file: Path):
    """Version 4 has merges as text, lists added tokens in the config too, and names other classes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    here = recipe_file.parent
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "aba": 3}, [("a", "b"), ("ab", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<eos>"])
    written = json.loads(backend.to_str())
    assert written["model"]["merges"] == [["a", "b"], ["ab", "a"]]
    for name in ("policy", "other"):
        write_model(here / name, characters=None)
        (here / name / "tokenizer.json").write_text(json.dumps(written))
        written["model"]["merges"] = ["a b", "ab a"]
    settings = {"tokenizer_class": "GPT2TokenizerFast", "added_tokens_decoder": {"4": {"content": "<eos>"}}}
    (here / "other" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_checked(recipe_file, ["reference.path=other"])
    written["model"]["vocab"] = {"b": 0, "a": 1, "ab": 2, "aba": 3}
    (here / "other" / "tokenizer.json").write_text(json.dumps(written))
    assert "2 of its 5 tokens" in problems_of(recipe_file, "reference.path=other")[0]


def test_where_the_other_model_has_no_tokenizer_its_embedding_must_have_a_row_for_every_token(recipe_file: Path):
    here = recipe_file.parent
    write_model(here / "other", characters=None, vocab_size=14)
    assert load_checked(recipe_file, ["reference.path=other"])
    write_model(here / "other", characters=None, vocab_size=13)
    (problem,) = problems_of(recipe_file, "reference.path=other")
    assert f"{here}/other has an embedding of 13 rows and gets ids up to 13" in problem


def test_a_reference_is_compared_with_what_the_stage_before_starts_from(recipe_file: Path):
    here = recipe_file.parent
    write_model(here / "other", characters="=+9876543210")
    text = RECIPE + "stages: [{name: sft, algorithm: {name: sft}, rewards: [], data: {max_tokens: 64}}, {name: grpo}]\n"
    recipe_file.write_text(text)
    assert load_checked(recipe_file, ["stages.grpo.reference.path=policy"])
    (problem,) = problems_of(recipe_file, "stages.grpo.reference.path=other")
    assert f"another tokenizer than {here}/out/sft/final" in problem


def test_an_embedding_with_fewer_rows_than_the_tokenizer_has_tokens_is_refused(recipe_file: Path):
    here = recipe_file.parent
    write_model(here / "policy", vocab_size=10)
    (problem,) = problems_of(recipe_file)
    assert problem == (
        f"{recipe_file}:2: model.path: {here}/policy has an embedding of 10 rows and gets ids up to 13: 4 of the "
        "tokenizer's 14 tokens have no row, such as '8'. Save the model after "
        "model.resize_token_embeddings(len(tokenizer)), or put the tokenizer that it was made with beside it"
    )
    write_model(here / "policy", vocab_size=14)
    assert load_checked(recipe_file)
    # As Gemma 3 of one billion parameters: it does not see, and its tokenizer is that of models that do.
    write_model(here / "policy", added=("<image_soft_token>",), vocab_size=14)
    assert load_checked(recipe_file)


def test_sequences_beyond_a_models_positions_are_refused_by_the_key_that_makes_them_so_long(recipe_file: Path):
    here = recipe_file.parent
    assert load_checked(recipe_file, ["rollout.max_new_tokens=48"])
    (problem,) = problems_of(recipe_file, "rollout.max_new_tokens=49")
    assert problem == (
        "command line: rollout.max_new_tokens: sequences may have 65 tokens (data.max_prompt_tokens + "
        f"rollout.max_new_tokens), and {here}/policy takes 64: lower one of them, or name a model that takes longer "
        "ones"
    )
    (problem,) = problems_of(recipe_file, "algorithm={name: sft}", "rewards=[]", "data.max_tokens=65")
    assert problem.startswith(
        f"command line: data.max_tokens: sequences may have 65 tokens (data.max_tokens), and {here}"
    )
    write_model(here / "other", max_position_embeddings=20)
    (problem,) = problems_of(recipe_file, PPO)
    assert f"{here}/other (algorithm.critic.path) takes 20" in problem


def test_a_new_models_positions_are_looked_at_too(recipe_file: Path):
    new = "model={path: null, architecture: {model_type: gpt2, n_positions: 21}, characters: '0123456789+='}"
    (problem,) = problems_of(recipe_file, new)
    assert "sequences may have 22 tokens" in problem and "the new model takes 21" in problem


def test_a_reward_model_is_held_against_its_own_tokenizer_and_positions(recipe_file: Path):
    here = recipe_file.parent
    override = "rewards=[{name: reward_model, args: {path: judge, max_tokens: 64}}]"
    judge: dict[str, Any] = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    write_model(here / "judge", characters="=+9876543210", **judge)
    assert load_checked(recipe_file, [override])
    (problem,) = problems_of(recipe_file, override.replace("64", "65"))
    assert problem.endswith(f"args.path: {here}/judge takes 64 tokens, and args.max_tokens is 65: lower it to 64")
    write_model(here / "judge", vocab_size=13, **judge)
    (problem,) = problems_of(recipe_file, override)
    assert f"{here}/judge has an embedding of 13 rows, and its tokenizer ids up to 13" in problem


def test_models_of_a_hub_are_looked_at_as_those_of_a_directory(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """As far as the hub, here its cache, has them."""
    cache = recipe_file.parent / "cache"
    for name, characters in (("same", CHARACTERS), ("other", "=+9876543210")):
        repository = cache / f"models--of_a_hub--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        (repository / "snapshots").mkdir()
        write_model(repository / "snapshots" / "abc", characters=characters)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert load_checked(recipe_file, ["reference.path=of_a_hub/same"])
    assert load_checked(recipe_file, ["reference.path=of_a_hub/nothing"])
    (problem,) = problems_of(recipe_file, "reference.path=of_a_hub/other")
    assert "of_a_hub/other has another tokenizer than" in problem
    (problem,) = problems_of(recipe_file, "model.path=of_a_hub/same", "rollout.max_new_tokens=49")
    assert "of_a_hub/same takes 64" in problem


def test_a_tokenizer_that_cannot_be_loaded_is_named_by_the_key_of_its_model(recipe_file: Path):
    write_model(recipe_file.parent / "other", characters=None)
    (recipe_file.parent / "other" / "vocab.json").write_text("{")
    (problem,) = problems_of(recipe_file, "reference.path=other")
    assert problem.startswith("command line: reference.path: no tokenizer can be loaded from ")


def test_a_teacher_of_another_tokenizer_or_of_shorter_sequences_is_refused(recipe_file: Path):
    here, opd = recipe_file.parent, ("algorithm={name: opd}", "rewards=[]", "teacher.path=other")
    write_model(here / "other", characters="=+9876543210")
    (problem,) = problems_of(recipe_file, *opd)
    assert problem.startswith(f"command line: teacher.path: {here}/other has another tokenizer than {here}/policy")
    write_model(here / "other", max_position_embeddings=32)
    (problem,) = problems_of(recipe_file, *opd, "rollout.max_new_tokens=48")
    assert f"{here}/other (teacher.path) takes 32" in problem


def test_a_teachers_most_probable_tokens_are_fewer_than_the_tokenizer_has(recipe_file: Path):
    here = recipe_file.parent
    write_model(here / "other")
    gkd = ["algorithm={name: gkd, distill: {top_k: 13, on_policy: 1.0}}", "rewards=[]", "teacher.path=other"]
    assert load_checked(recipe_file, gkd)
    (problem,) = problems_of(recipe_file, gkd[0].replace("13", "14"), *gkd[1:])
    assert problem == (
        f"command line: algorithm.distill.top_k: is 14, and the tokenizer of {here}/policy has 14 tokens: "
        "lower it, or leave it out to compare the whole vocabulary"
    )


def test_trained_tokens_have_a_row_in_the_embedding(recipe_file: Path):
    adapter = "model.adapter={peft: {peft_type: TRAINABLE_TOKENS, token_indices: [3, 63]}}"
    assert load_checked(recipe_file, [adapter])
    (problem,) = problems_of(recipe_file, adapter.replace("63", "64"))
    assert problem.endswith(
        f"model.adapter.peft.token_indices: 64 is no row of {recipe_file.parent}/policy's embedding, which has 64"
    )
