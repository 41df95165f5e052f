"""The settings of a chat template, and its date: the same in every rendering of a run."""

from __future__ import annotations

from datetime import date

import pytest
import yaml
from transformers import AutoTokenizer

from rlflow.data.chat import Chat
from rlflow.data.errors import DataError
from rlflow.data.examples import load_examples
from rlflow.data.prompts import load_prompts
from rlflow.data.template_date import pin_template_dates
from rlflow.data.tokenizer import load_tokenizer
from rlflow.recipe import ModelBlock, Recipe, dump_recipe

THINKS = (
    "\n  {%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if effort %}{{ effort }}{% endif %}{% endif %}"
)
DATED = "Today is {{ strftime_now('%d %b %Y') }}. {% for m in messages %}{{ m['content'] }}{% if m['role'] == "
DATED += "'assistant' %}<|im_end|>{% endif %}{% endfor %}"
QUESTION = [{"role": "user", "content": "Hi"}]


def recipe(output_dir, **data) -> Recipe:
    return Recipe.model_validate(
        {
            "algorithm": {"name": "sft"},
            "model": {"path": "m"},
            "data": {"train": {"path": "rows.jsonl"}, **data},
            "run": {"steps": 1, "output_dir": str(output_dir)},
        }
    )


@pytest.fixture
def load(tmp_path, tokenizer):
    """load(template, **kwargs) -> the tokenizer of a model whose template is set so."""

    def load(template: str, **kwargs):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        return load_tokenizer(ModelBlock(path=str(tmp_path), chat_template_kwargs=kwargs))

    return load


def test_a_setting_reaches_prompts_and_whoever_loads_the_saved_tokenizer(load, make_data, tmp_path):
    plain, set_ = load(THINKS), load(THINKS, enable_thinking=False)
    data = make_data([{"prompt": "Hi"}])
    texts = [t.decode(load_prompts(data.train, data, t, 0)[0].token_ids) for t in (plain, set_)]
    asked = plain.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert texts == [asked, f"{asked}<think>\n\n</think>\n\n"]
    set_.save_pretrained(tmp_path / "final")
    served = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert served.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == texts[1]
    with_thoughts = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    assert served.apply_chat_template(QUESTION, **with_thoughts) == texts[0]


@pytest.mark.parametrize("value", [True, 0, 2.5e-7, 'it\'s "x"\n{{é}}', ["a", None], {"b": {"c": False}}])
def test_a_setting_is_what_the_template_reads_whatever_its_type(load, value):
    tokenizer = load("{{ x | tojson }} {{ messages[0]['content'] }}", x=value)
    plain = load("{{ x | tojson }} {{ messages[0]['content'] }}")
    asked = plain.apply_chat_template(QUESTION, tokenize=False, x=value)
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == asked


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"enable_thinkin": False}, r"does not read enable_thinkin; it reads .*\. Nearest: enable_thinking\."),
        ({"messages": []}, "messages is given by every rendering itself: remove it"),
        ({"m": 1}, "does not read m;"),
    ],
)
def test_a_setting_that_the_template_never_reads_is_refused(load, kwargs, says):
    with pytest.raises(DataError, match=f"model.chat_template_kwargs: .*{says}"):
        load(THINKS, **kwargs)


def test_a_setting_without_a_template_is_refused(load, tokenizer):
    with pytest.raises(DataError, match="has no chat template that could read them"):
        load(None, enable_thinking=False)


def test_the_date_of_the_recipe_is_what_prompts_and_examples_have(make_data, tokenizer):
    tokenizer.chat_template = DATED
    data = make_data([{"prompt": "Hi", "response": "Two"}], template_date=date(2026, 1, 31))
    for rows in (load_prompts(data.train, data, tokenizer, 0), load_examples(data, tokenizer, 0)):
        assert tokenizer.decode(rows[0].token_ids).startswith("Today is 31 Jan 2026. Hi")
    assert Chat(tokenizer).render_prompt(QUESTION).text == date.today().strftime("Today is %d %b %Y. Hi")


def test_a_run_has_the_date_of_the_day_it_starts_and_keeps_it_when_it_is_resumed(tmp_path):
    (started,) = pin_template_dates([recipe(tmp_path)], resume=False)
    assert started.data.template_date == date.today()
    earlier = recipe(tmp_path, template_date=date(2020, 2, 29))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(earlier))
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["template_date"] == "2020-02-29"
    (resumed,) = pin_template_dates([recipe(tmp_path)], resume=True)
    (anew,) = pin_template_dates([recipe(tmp_path)], resume=False)
    assert resumed == earlier and anew.data.template_date == date.today()
    (given,) = pin_template_dates([recipe(tmp_path, template_date="2021-03-04")], resume=True)
    assert given.data.template_date == date(2021, 3, 4)
