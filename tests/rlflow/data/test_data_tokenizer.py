"""Loading a tokenizer, making one of characters, and the tokens that end a completion."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from rlflow.data.errors import DataError
from rlflow.data.tokenizer import (
    build_character_tokenizer,
    give_own_pad,
    load_tokenizer,
    save_tokenizer,
    stop_token_ids,
    write_stop_tokens,
)
from rlflow.recipe.schema import ModelBlock

EXCHANGE = [{"role": "user", "content": "12+34="}, {"role": "assistant", "content": "46"}]


def test_a_character_tokenizer_has_a_token_a_character_behind_pad_and_eos():
    tokenizer = build_character_tokenizer("0123456789+= \n")
    assert tokenizer("12+34=\n ").input_ids == [3, 4, 12, 5, 6, 13, 15, 14]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 16)
    assert tokenizer.decode([3, 4, 12, 5, 14, 14, 15]) == "12+3  \n"


def test_characters_that_repeat_are_one_token():
    assert len(build_character_tokenizer("abca")) == 5


def test_a_character_tokenizer_puts_contents_end_to_end_and_closes_an_answer():
    tokenizer = build_character_tokenizer("0123456789+=")
    assert tokenizer.apply_chat_template(EXCHANGE, tokenize=False) == "12+34=46<eos>"
    assert tokenizer.apply_chat_template(EXCHANGE[:1], tokenize=False, add_generation_prompt=True) == "12+34="


def test_a_saved_character_tokenizer_is_the_same_when_transformers_loads_it(tmp_path):
    made = build_character_tokenizer("0123456789+= àé𝄞")
    made.save_pretrained(tmp_path)
    text = "12 +à 𝄞é=<eos>"
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(ModelBlock(path=str(tmp_path)))):
        assert loaded.get_vocab() == made.get_vocab()
        assert loaded(text).input_ids == made(text).input_ids
        assert loaded.decode(made(text).input_ids) == text
        assert loaded.decode(made(text).input_ids, skip_special_tokens=True) == text.removesuffix("<eos>")
        assert (loaded.eos_token_id, loaded.pad_token_id) == (1, 0)
        assert loaded.apply_chat_template(EXCHANGE, tokenize=False) == "12+34=46<eos>"


def test_a_new_model_has_the_tokenizer_of_its_characters():
    block = ModelBlock(architecture={"model_type": "llama"}, characters="ab")
    assert load_tokenizer(block)("ba").input_ids == [3, 2]


def test_a_template_of_the_recipe_goes_before_the_models_own(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ 'from a file' }}")
    path = str(tmp_path)
    assert load_tokenizer(ModelBlock(path=path)).chat_template == tokenizer.chat_template
    assert load_tokenizer(ModelBlock(path=path, chat_template="{{ 'text' }}")).chat_template == "{{ 'text' }}"
    assert load_tokenizer(ModelBlock(path=path, chat_template=str(template))).chat_template == "{{ 'from a file' }}"
    with pytest.raises(DataError, match=r"neither a Jinja template nor a file. Nearest: mine.jinja"):
        load_tokenizer(ModelBlock(path=path, chat_template=f"{path}/mien.jinja"))


def test_a_directory_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "SmolLM2-135M").mkdir()
    with pytest.raises(DataError, match=r"there is no directory .*SmolLM2-153M. Nearest: SmolLM2-135M"):
        load_tokenizer(ModelBlock(path=f"{tmp_path}/SmolLM2-153M"))


def test_a_directory_without_a_tokenizer_says_what_to_give(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"(?s)no tokenizer can be loaded from .*tokenizer\.json"):
        load_tokenizer(ModelBlock(path=str(tmp_path)))


@pytest.mark.parametrize("content", ['{"version": "1.0"', "{}", "[]"])
def test_a_damaged_tokenizer_says_so(tmp_path, tokenizer, content):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_tokenizer(ModelBlock(path=str(tmp_path)))


@pytest.mark.parametrize(("config", "expected"), [(None, (2,)), (0, (0, 2)), ([0, 1], (0, 1, 2))])
def test_completions_stop_at_eos_the_templates_end_of_turn_and_what_the_model_says(
    tmp_path, tokenizer, config, expected
):
    settings = {} if config is None else {"eos_token_id": config}
    model = ModelBlock(path=str(tmp_path))
    assert stop_token_ids(tokenizer, model) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert stop_token_ids(tokenizer, model) == expected


def test_a_hub_is_asked_once_for_its_stop_tokens(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    asked = []

    def cached_file(*place, **_):
        asked.append(place)
        return str(tmp_path / place[1])

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    for _ in range(2):
        assert stop_token_ids(tokenizer, ModelBlock(path="org/stops")) == (0, 1, 2)
    assert asked == [("org/stops", "generation_config.json")]


def test_the_end_of_turn_stops_although_eos_is_another_token(tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_token_ids(tokenizer, ModelBlock(characters="a")) == (0, 2)


def test_a_pad_that_ends_completions_is_replaced_by_a_special_token_for_padding(tmp_path):
    """As that of Qwen2.5, whose generation config has it among the stops, and whose <|fim_pad|> is one of text."""
    tokenizer = build_character_tokenizer("abc")
    tokenizer.add_tokens(["<|fim_pad|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<|vision_pad|>"]})
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    pad = give_own_pad(tokenizer, ModelBlock(path=str(tmp_path)))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|vision_pad|>", pad)
    assert tokenizer.eos_token == "<eos>"


@pytest.mark.slow
def test_loading_from_a_directory_imports_no_torch(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    program = (
        "import sys\n"
        "from rlflow.data.prompts import load_prompts\n"
        "from rlflow.data.tokenizer import load_tokenizer\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "from rlflow.recipe import DataBlock, ModelBlock, SourceBlock\n"
        f"tokenizer = load_tokenizer(ModelBlock(path={str(tmp_path)!r}))\n"
        "source = SourceBlock(generator='arithmetic', args={'digits': 1})\n"
        "assert load_prompts(source, DataBlock(train=source), tokenizer, 0)\n"
        "assert not {'torch', 'datasets', 'ray', 'vllm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_stop_tokens_are_added_to_those_of_the_generation_config(tmp_path):
    write_stop_tokens(tmp_path, (1,))
    assert not list(tmp_path.iterdir())
    path = tmp_path / "generation_config.json"
    for before, stop, after in [(None, (1,), 1), (1, (1,), 1), (2, (1,), [1, 2]), ([2, 3], (1, 3), [1, 2, 3])]:
        path.write_text(json.dumps({"eos_token_id": before, "top_p": 0.9, "_from_model_config": True}))
        write_stop_tokens(tmp_path, stop)
        assert json.loads(path.read_text()) == {"eos_token_id": after, "top_p": 0.9}


def test_a_saved_tokenizer_is_in_words_that_version_4_of_transformers_knows_and_is_the_same_to_version_5(tmp_path):
    tokenizer = build_character_tokenizer("abc")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    for _ in range(2):
        save_tokenizer(tokenizer, tmp_path)
        written = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert written["additional_special_tokens"] == ["<think>", "</think>"]
        assert not {"extra_special_tokens", "backend", "is_local"} & written.keys()
        again = load_tokenizer(ModelBlock(path=str(tmp_path)))
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.all_special_tokens == tokenizer.all_special_tokens
        assert again.decode([2, 5, 3, 1], skip_special_tokens=True) == "ab"
        tokenizer = again
