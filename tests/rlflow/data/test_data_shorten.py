"""`overlong: truncate`: bos, system message and role markers stay, characters stay whole."""

from __future__ import annotations

import pytest

from rlflow.data.prompts import load_prompts
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.recipe.data_blocks import DataBlock, SourceBlock

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM = {"role": "system", "content": "sys"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def cut(write_jsonl):
    """cut(row, limit) -> the texts of the prompts, a token a character and a token a marker, and the loaded rows."""
    tokenizer = build_character_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789", TEMPLATE)
    markers = ["<system>", "<user>", "<assistant>", "<tool>"]
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": markers})

    def cut(row: dict, limit: int):
        source = SourceBlock(path=str(write_jsonl([{"messages": [user("a")]}, row])))
        data = DataBlock(train=source, max_prompt_tokens=limit, overlong="truncate")
        prompts = load_prompts(source, data, tokenizer, 0)
        return [tokenizer.decode(prompt.token_ids) for prompt in prompts], prompts

    return cut


def test_the_middle_of_the_message_goes_and_its_beginning_and_end_stay(cut):
    texts, _ = cut({"messages": [user("abcdefghijkl")]}, 10)
    assert texts[-1] == "<s><user>abcijkl<assistant>"


def test_whole_exchanges_go_first_the_oldest_ones_and_the_messages_say_so(cut):
    messages = [SYSTEM, user("aaaa"), answer("bbbb"), user("cccc"), answer("dddd"), user("eeee")]
    for limit, left in [(31, messages), (30, [SYSTEM, *messages[3:]]), (20, [SYSTEM, messages[5]])]:
        texts, prompts = cut({"messages": messages}, limit)
        said = "".join(f"<{m['role']}>{m['content']}" for m in left)
        assert texts[-1] == f"<s>{said}<assistant>" and list(prompts[-1].messages) == left


def test_the_longest_message_of_the_last_exchange_is_cut_and_never_the_system_message(cut):
    messages = [
        {"role": "system", "content": "s" * 20},
        user("why"),
        answer("a"),
        {"role": "tool", "content": "0123456789"},
    ]
    texts, _ = cut({"messages": messages}, 35)
    assert texts[-1] == f"<s><system>{'s' * 20}<user>why<assistant>a<tool>01789<assistant>"


def test_a_prompt_that_cannot_be_cut_so_far_is_left_out_and_named(cut):
    _, prompts = cut({"messages": [{"role": "system", "content": "s" * 20}, user("why")]}, 20)
    reason = "cannot be cut to 20 tokens: 7 tokens too many, and its longest message has 3"
    assert [prompt.id for prompt in prompts] == ["rows:1"]
    assert [(bad.row, bad.reason) for bad in prompts.skipped] == [(2, reason)]


def test_a_character_of_several_tokens_is_not_parted(make_data, tokenizer):
    for limit in range(33, 45):
        data = make_data([{"prompt": "𝄞" * 30}], max_prompt_tokens=limit, overlong="truncate")
        (prompt,) = load_prompts(data.train, data, tokenizer, 0)
        text = tokenizer.decode(prompt.token_ids)
        left = text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert set(left) == {"𝄞"} and limit - 4 < len(prompt.token_ids) <= limit


def test_plain_text_keeps_its_bos_and_its_end(write_jsonl, tokenizer):
    tokenizer.bos_token = "<|endoftext|>"
    path = str(write_jsonl([{"text": "<|endoftext|>" + "x" * 50 + "y"}]))
    source = SourceBlock(path=path, format="text")
    data = DataBlock(train=source, max_prompt_tokens=5, overlong="truncate")
    (prompt,) = load_prompts(source, data, tokenizer, 0)
    assert tokenizer.decode(prompt.token_ids) == "<|endoftext|>xxxy"
