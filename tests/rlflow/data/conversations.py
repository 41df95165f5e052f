# ruff: noqa: RUF001
"""Conversations of a policy and an environment by the templates that models are published with: TRL's copies."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlflow.data.call_reader import CallReader
from rlflow.data.chat import Chat
from rlflow.data.prompts import opened_tag
from rlflow.data.transcript import Transcript
from rlflow.types import Completion

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
LLAMA = ["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"]
DEEPSEEK = [
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
]
HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
GLM = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<think>", "</think>"]
GEMMA = ["<bos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"]
MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {\"content\": {{ m.content | tojson }}}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}"
    "{% else %} {{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""In the form of Mistral's published templates of version 3."""
FAMILIES: dict[str, tuple[str, list[str], list[str]]] = {
    "qwen2.5": ("qwen2_5.jinja", CHATML, ["<|im_end|>", "<|endoftext|>"]),
    "qwen3": ("qwen3.jinja", CHATML, ["<|im_end|>", "<|endoftext|>"]),
    "qwen3, not thinking": (
        "{% set enable_thinking = false %}" + (TEMPLATES / "qwen3.jinja").read_text(),
        CHATML,
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen3-2507": ("qwen3_instruct_2507.jinja", CHATML, ["<|im_end|>"]),
    "qwen3.5": ("qwen3_5_think.jinja", CHATML, ["<|im_end|>"]),
    "llama3.1": ("llama3_1.jinja", LLAMA, ["<|eot_id|>", "<|eom_id|>"]),
    "llama3.2": ("llama3_2.jinja", LLAMA, ["<|eot_id|>", "<|eom_id|>"]),
    "deepseek-v3": ("deepseekv3.jinja", DEEPSEEK, ["<｜end▁of▁sentence｜>"]),
    "gpt-oss": ("gptoss.jinja", HARMONY, ["<|return|>", "<|call|>"]),
    "glm-4.5": ("glm4moe.jinja", GLM, ["<|user|>", "<|observation|>"]),
    "mistral": (MISTRAL_TEMPLATE, [*MISTRAL, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], ["</s>"]),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "one"},
                "b": {"type": "integer", "description": "b"},
            },
            "required": ["a", "b"],
        },
    },
}


def tokenizer_of(template: str, special: list[str], ends: list[str]) -> PreTrainedTokenizerFast:
    """Bytes, and a token for each special text: whatever a template writes, it has few tokens and no surprises."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=ends[0], clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (TEMPLATES / template).read_text() if template.endswith(".jinja") else template
    return tokenizer


class Conversation:
    """A policy that says what the template would have it say, and an environment; token for token."""

    def __init__(self, family: str) -> None:
        self.family = family
        template, special, ends = FAMILIES[family]
        self.tokenizer = tokenizer_of(template, special, ends)
        self.chat = Chat(self.tokenizer)
        self.render = self.chat.renderer([TOOL], generation_prompt=True)
        self.stops = [self.tokenizer.convert_tokens_to_ids(end) for end in ends]
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 1 + 2 + 3?"}]
        self.transcript = Transcript(self.chat, self.stops, self.messages, [TOOL], self.encode(self.messages))
        self.reader = CallReader(self.chat)
        self.prompts = [self.encode(self.messages)]
        """Of each turn: all that the template writes before it, in tokens."""
        self.wrote: list[list[int]] = []

    def encode(self, messages: list[dict[str, Any]]) -> np.ndarray:
        return np.array(self.tokenizer(self.render(messages), add_special_tokens=False)["input_ids"], dtype=np.int32)

    def turn(self, message: dict[str, Any], heard: dict[str, Any]) -> None:
        """The policy says what the template writes of the message, up to the token that ends the turn."""
        before = self.render(self.messages)
        opened = opened_tag(before)
        as_last = self.chat.renderer([TOOL])([*self.messages, message])
        start = len(before) - len(opened)
        assert as_last.startswith(before[:start])
        said = as_last[start:].removeprefix(opened)
        if opened and not as_last.startswith(opened, start):
            said = f"so\n</think>{said}"
        tokens = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        end = next((place for place, token in enumerate(tokens) if token in self.stops), None)
        # GLM's turns end with the marker of whoever speaks next.
        tokens = [*tokens, self.stop_before(heard)] if end is None else tokens[: end + 1]
        written = np.array(tokens, dtype=np.int32)
        text = self.tokenizer.decode(tokens[:-1], skip_special_tokens=False)
        message = self.reader.read(opened + text, [TOOL]).message
        self.wrote.append(written.tolist())
        ones = np.ones(len(written), dtype=np.int32)
        self.transcript.wrote(Completion(0, written, -ones.astype(np.float32), ones, "stop"), message)
        self.transcript.heard([heard])
        self.messages += [message, heard]
        self.prompts.append(self.encode(self.messages))

    def stop_before(self, heard: dict[str, Any]) -> int:
        return self.tokenizer.convert_tokens_to_ids("<|observation|>" if heard["role"] == "tool" else "<|user|>")

    def play(self, thought: str = "") -> None:
        """Calls with their results, then an answer and one more question: three turns."""
        # DeepSeek-V3's template has no second call: it leaves out what came before it.
        for index in range(1 if self.family == "deepseek-v3" else 2):
            call = {"type": "function", "id": f"call0000{index}", "function": {"name": "add", "arguments": {"a": 1}}}
            self.turn(
                {"role": "assistant", "content": thought, "tool_calls": [call]},
                {"role": "tool", "name": "add", "tool_call_id": call["id"], "content": str(3 * index)},
            )
        while len(self.wrote) < 3:
            said = f"{thought}It is {len(self.wrote)}."
            self.turn({"role": "assistant", "content": said}, {"role": "user", "content": "Sure?"})


def sequences_of(transcript: Transcript) -> list[tuple[list[int], list[bool]]]:
    token_ids, is_sampled, _, _, starts = transcript.stream()
    borders = [*starts, len(token_ids)]
    return [(token_ids[start:end].tolist(), is_sampled[start:end].tolist()) for start, end in pairwise(borders)]
