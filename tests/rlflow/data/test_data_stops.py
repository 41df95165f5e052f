"""A rollout's prompt is a prefix of the example, and every trained answer ends with what the policy stops at."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlflow.data.chat import Chat
from rlflow.data.encoding import Encoder, Rendered
from rlflow.data.errors import DataError, RowError
from rlflow.data.examples import load_examples
from rlflow.data.preferences import load_labelled, load_pairs
from rlflow.data.prompts import load_prompts
from rlflow.data.tokenizer import stop_token_ids
from rlflow.recipe.schema import ModelBlock

SPACE_ENDS_PROMPT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}ASSISTANT: "
    "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""As Vicuna's: `` two`` is a token of the tokenizer below, so that it would reach into the prompt."""
ROLE_ENDS_TURN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As GLM's."""
NOTHING_ENDS_TURN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CUTS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""As DeepSeek-R1's, whose generation prompt opens a thought."""


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def chat(tokenizer):
    """chat(template, *special tokens) -> a Chat of the byte-level tokenizer."""

    def chat(template: str, *special: str) -> Chat:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.chat_template = template
        return Chat(tokenizer)

    return chat


def trained(chat: Chat, rendered: Rendered) -> list[str]:
    """Every run of trained tokens, decoded."""
    ((token_ids, mask),) = chat.encode_trained([rendered])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [chat.tokenizer.decode(token_ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("template", ["chatml", SPACE_ENDS_PROMPT, ROLE_ENDS_TURN])
@pytest.mark.parametrize("said", ["two", " two", "\ntwo", "\n\n two is", "𝄞"])
def test_every_turns_prompt_is_a_prefix_of_the_example(chat, tokenizer, template, said):
    chat = chat(tokenizer.chat_template if template == "chatml" else template, "<|user|>", "<|assistant|>")
    messages = [user("What is two"), answer(said), user("plus two?\n"), answer(said)]
    ((example, mask),) = chat.encode_trained([chat.render_conversation(messages, [1, 3])])
    for turn in (1, 3):
        (prompt,) = chat.encode([chat.render_prompt(messages[:turn])])
        assert example[: len(prompt)].tolist() == prompt.tolist()
        assert mask[len(prompt)] and not mask[len(prompt) - 1]


def test_an_answer_that_would_share_a_token_with_its_prompt_is_trained_whole(chat, tokenizer):
    chat = chat(SPACE_ENDS_PROMPT)
    (joint,) = tokenizer(" two", add_special_tokens=False).input_ids
    rendered = chat.render_conversation([user("Hi"), answer("two"), user("Why?"), answer("two")], [1, 3])
    ((token_ids, _),) = chat.encode_trained([rendered])
    assert trained(chat, rendered) == ["two<|im_end|>", "two<|im_end|>"] and joint not in token_ids
    assert tokenizer.decode(token_ids) == rendered.text


def test_rollouts_sft_dpo_kto_and_reward_models_have_the_same_prompt(make_data, tokenizer):
    tokenizer.chat_template = SPACE_ENDS_PROMPT
    pair = {"prompt": "Hi", "chosen": "two", "rejected": "two plus two"}
    judged = [{"prompt": "Hi", "completion": text, "label": text == "two"} for text in ("two", "two plus two")]
    data = make_data([{"prompt": "Hi", "response": "two"}])
    (prompt,) = load_prompts(data.train, data, tokenizer, 0)
    examples = [*load_examples(data, tokenizer, 0)]
    examples += [row.example for row in load_labelled(make_data(judged), tokenizer, 0)]
    for for_reward_model in (False, True):
        (row,) = load_pairs(make_data([pair]), tokenizer, 0, for_reward_model=for_reward_model)
        examples += [row.chosen, row.rejected]
    for example in examples:
        assert example.token_ids[: len(prompt.token_ids)].tolist() == prompt.token_ids.tolist()
        assert int(example.loss_mask.argmax()) == len(prompt.token_ids)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_what_follows_a_prompt_gets_no_space_that_the_tokenizer_puts_before_a_text(scheme):
    pieces = ["<unk>", "\n", "▁", "▁two", "two", ":", "▁A"]
    backend = Tokenizer(models.Unigram([(piece, -0.1 * n) for n, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ((token_ids, mask),) = Encoder(tokenizer, ()).encode_trained([Rendered("A: two", ((3, 6),), (3,))])
    assert tokenizer.convert_ids_to_tokens(token_ids.tolist()) == ["▁A", ":", "▁", "two"]
    assert mask.tolist() == [False, False, False, True]


def test_space_that_a_tokenizer_divides_by_what_follows_is_encoded_as_the_prompt_has_it():
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: id_ for id_, symbol in enumerate([*symbols, "ĊĊ"])}, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.convert_ids_to_tokens(tokenizer("A\n\nB").input_ids) == ["A", "Ċ", "Ċ", "B"], "GPT-2's habit"
    encoder = Encoder(tokenizer, ())
    ((token_ids, mask),) = encoder.encode_trained([Rendered("A\n\nB", ((3, 4),), (3,))])
    (prompt,) = encoder.encode([Rendered("A\n\n")])
    assert tokenizer.convert_ids_to_tokens(token_ids.tolist()) == ["A", "ĊĊ", "B"]
    assert prompt.tolist() == token_ids[:2].tolist() and mask.tolist() == [False, False, True]


def test_a_turn_that_the_next_roles_marker_ends_is_trained_to_stop_at_it(chat, tokenizer, tmp_path):
    chat = chat(ROLE_ENDS_TURN, "<|user|>", "<|assistant|>", "<|tool|>")
    messages = [user("Hi"), answer("two"), user("Why?"), answer("one")]
    rendered = chat.render_conversation(messages, [1, 3])
    assert rendered.text == "<|user|>Hi<|assistant|>two<|user|>Why?<|assistant|>one<|user|>"
    assert trained(chat, rendered) == ["two<|user|>", "one<|user|>"]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|user|>", "<|tool|>"])
    assert list(stop_token_ids(tokenizer, ModelBlock(path=str(tmp_path)))) == sorted(ends)


def test_an_answer_that_nothing_ends_gets_eos(chat, tokenizer):
    chat = chat(NOTHING_ENDS_TURN)
    rendered = chat.render_conversation([user("Hi"), answer("one"), user("Why?"), answer("two")], [3])
    assert rendered.text == "user: Hi\nassistant: one\nuser: Why?\nassistant: two<|im_end|>"
    assert trained(chat, rendered) == ["two<|im_end|>"]


def test_an_earlier_answer_that_nothing_ends_cannot_be_trained(chat):
    with pytest.raises(RowError, match=r"ends messages\[1\] with nothing that the policy could stop at: .*loss_on"):
        chat(NOTHING_ENDS_TURN).render_conversation([user("Hi"), answer("one"), user("Why?"), answer("two")], [1, 3])


def test_nor_can_one_that_ends_otherwise_than_what_the_policy_stops_at(chat):
    """As gpt-oss' ``<|end|>``, which thoughts have as well: its answers end with ``<|return|>`` where they are last."""
    template = ROLE_ENDS_TURN.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ '<|im_end|>' if loop.last else '<|end|>' }}"
    )
    template = template.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls[0].function.name if m.tool_calls }}"
    )
    chat = chat(template, "<|user|>", "<|assistant|>", "<|end|>")
    messages = [user("Hi"), answer("one"), user("Why?"), answer("two")]
    assert trained(chat, chat.render_conversation(messages, [3])) == ["two<|im_end|>"]
    with pytest.raises(
        RowError, match=r"ends messages\[1\] with <\|end\|>, at which the policy does not stop at: .*loss_on"
    ):
        chat.render_conversation(messages, [1, 3])
    call = {**answer("one"), "tool_calls": [{"type": "function", "function": {"name": "o", "arguments": {}}}]}
    assert trained(chat, chat.render_conversation([user("Hi"), call, *messages[2:]], [1])) == ["oneo<|end|>"]


def test_without_any_token_to_stop_at_nothing_is_trained(chat, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither the chat template nor the tokenizer has a token that ends an answer"):
        chat(NOTHING_ENDS_TURN).render_conversation([user("Hi"), answer("two")], [1])


def test_a_reward_model_reads_a_conversation_as_its_template_has_it(make_data, tokenizer):
    tokenizer.chat_template = NOTHING_ENDS_TURN
    data = make_data([{"prompt": "Hi", "chosen": "two", "rejected": "one"}])
    (read,) = load_pairs(data, tokenizer, 0, for_reward_model=True)
    (written,) = load_pairs(data, tokenizer, 0)
    assert tokenizer.decode(read.chosen.token_ids) == "user: Hi\nassistant: two\n"
    assert tokenizer.decode(written.chosen.token_ids) == "user: Hi\nassistant: two<|im_end|>"
    chat = Chat(tokenizer)
    (scored,) = chat.encode([chat.render_whole([user("Hi"), answer("two")])])
    assert scored.tolist() == read.chosen.token_ids.tolist()


@pytest.mark.parametrize("loss_on", ["all_assistant", "last_assistant", "all"])
def test_a_thought_that_the_template_cuts_goes_behind_the_generation_prompt_that_opens_it(
    make_data, tokenizer, loss_on
):
    tokenizer.chat_template = CUTS_THOUGHTS
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\ntwo<|im_end|>\n"
    for said in (answer("<think>\nhm\n</think>\n\ntwo"), {**answer("\n\ntwo"), "reasoning_content": "hm"}):
        (example,) = load_examples(make_data([{"messages": [user("Hi"), said]}], loss_on=loss_on), tokenizer, 0)
        seen = tokenizer.decode(example.token_ids)
        assert seen.replace("</think>\n\n\n\n", "</think>\n\n") == text
        if loss_on != "all":
            assert tokenizer.decode(example.token_ids[example.loss_mask]).startswith("hm\n</think>\n\n")


def test_so_does_one_that_the_answer_repeats_or_that_has_no_opening_tag(chat):
    chat = chat(CUTS_THOUGHTS)
    written = ("<think>\ntwo\n</think>\n\ntwo.", "two\n</think>\n\ntwo.", "\ntwo\n</think>\n\ntwo.")
    for said in (*map(answer, written), {**answer("two."), "reasoning_content": "two"}):
        assert trained(chat, chat.render_conversation([user("Hi"), said], [1])) == ["two\n</think>\n\ntwo.<|im_end|>"]


def test_an_empty_thought_that_the_template_puts_in_is_closed_behind_the_generation_prompt_that_opens_it(chat):
    empty = CUTS_THOUGHTS.replace("{{ m['content'].split", "{{ ('<think></think>' if m['role'] == 'assistant' else '')")
    empty = empty.replace(
        "'')('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}", "'') + m['content'] }}"
    )
    rendered = chat(empty).render_conversation([user("Hi"), answer("two")], [1])
    assert rendered.text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n</think>two<|im_end|>\n"
    assert trained(chat(empty), rendered) == ["</think>two<|im_end|>"] and rendered.notes == ()


def test_an_answer_without_the_thought_that_the_generation_prompt_opens_is_a_bad_row(chat):
    with pytest.raises(
        RowError, match=r"the generation prompt opens a thought \('<think>'\), and messages\[1\] has none"
    ):
        chat(CUTS_THOUGHTS).render_conversation([user("Hi"), answer("two")], [1])


def test_tokens_whose_leading_space_is_trimmed_from_their_offsets_are_not_trained_with_a_span_behind_it(tokenizer):
    processor = json.loads(tokenizer.backend_tokenizer.to_str())
    processor["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    trimmed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(processor)))
    two, plus = (trimmed(text).input_ids[0] for text in (" two", " plus"))
    encoded = trimmed("is two plus", return_offsets_mapping=True)
    at = encoded["input_ids"].index(two)
    assert encoded["offset_mapping"][at] == (3, 6), "its space is at 2"
    ((token_ids, mask),) = Encoder(trimmed, ()).encode_trained([Rendered("is two plus", ((3, 11),))])
    assert token_ids[mask].tolist() == [plus]
