"""Function calls in what a policy wrote: read as the tokenizer, vLLM or the chat template says that they are written.

Where a tokenizer has a response schema, transformers reads by it; where a recipe names a parser of vLLM's, that does.
Otherwise the template is asked: it renders a call with a name and arguments that are known, and what stands before,
between and behind them is how calls are written. Where a template writes none, they are Hermes'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlflow.data.call_values import types_of_arguments, value_of
from rlflow.data.calls import to_calls
from rlflow.data.chat import QUESTION, Chat
from rlflow.data.errors import RowError
from rlflow.data.prompts import THOUGHT_BEGINS, opened_tag
from rlflow.data.template import template_text
from rlflow.data.transcript import THOUGHT_ENDS
from rlflow.data.vllm_calls import VllmCalls
from rlflow.types import Message

_NAME, _ARGUMENTS = "zqx_called_xqz", {"zqx": "xqz"}
_PROBE = {"type": "function", "id": "zqxcalled", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "d",
        "parameters": {"type": "object", "properties": {"zqx": {"type": "string", "description": "d"}}},
    },
}
_ARGUMENTS_TEXT = re.compile(r'\{\s*"zqx"\s*:\s*"xqz"\s*\}')
_OF_EACH_TYPE: dict[str, tuple[str, Any]] = {
    "zqx": ("string", "xqz"),
    "zqn": ("integer", 2),
    "zqt": ("boolean", True),
    "zql": ("array", [1, {"k": "v"}]),
}
_HERMES = "<tool_call>"
_MORE = re.compile(r"[\s;,]*\{\s*\"")
"""What follows a call where a second one stands in its place: templates write one there, and others call none."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a policy's text says."""

    message: Message
    """``{"role": "assistant", "content": ..., "tool_calls": [...]}``; without calls there is no such key."""
    problems: tuple[str, ...] = ()
    """Why calls in it could not be read, for the policy to hear."""


class CallReader:
    """How one model's calls are read."""

    def __init__(self, chat: Chat, parser: str = "auto") -> None:
        """
        Args:
            parser: ``auto``, or the name of a tool parser of vLLM's.

        Raises:
            ValueError: vLLM has none of that name, or is not installed.
        """
        self._tokenizer = chat.tokenizer
        self._form = _form_of(chat)
        self._vllm = None if parser == "auto" else VllmCalls(parser, chat.tokenizer)
        self._schema = vars(chat.tokenizer).get("response_template")

    @property
    def is_always_needed(self) -> bool:
        """Whether what is said without calls has a form, too, that its text must be read out of."""
        return isinstance(self._form, Harmony)

    def read(self, text: str, tools: Sequence[Any] = (), prompt: str = "") -> Said:
        """The message that a text is; the text of its calls is no part of what it says.

        Args:
            text: What the policy wrote, behind a thought that its prompt opened.
            tools: JSON schemas of the functions that may be called.
            prompt: What is before it.
        """
        if self._vllm is None and self._schema is None:
            return self._by_form(text, tools)
        try:
            if self._vllm is not None:
                said = self._by_vllm(self._vllm, text, tools)
            else:
                said = _by_schema(self._tokenizer, text, prompt, tools)
        except RowError as error:
            return Said({"role": "assistant", "content": text}, (str(error),))
        # Parsers that find no call do not say whether there should have been one.
        return said if "tool_calls" in said.message else Said(said.message, self._by_form(text, tools).problems)

    def _by_vllm(self, parser: VllmCalls, text: str, tools: Sequence[Any]) -> Said:
        if isinstance(self._form, Harmony):
            return _with_calls(*parser.read(text, tools))
        thought, behind = _parted(text)
        said = _with_calls(*parser.read(behind, tools))
        return Said({**said.message, "content": thought + said.message["content"]})

    def _by_form(self, text: str, tools: Sequence[Any]) -> Said:
        if isinstance(self._form, Harmony):
            return self._form.read(text, tools)
        # What a policy considers while it thinks is no call.
        thought, behind = _parted(text)
        said = self._form.read(behind, tools)
        return Said({**said.message, "content": thought + said.message["content"]}, said.problems)


@dataclass(frozen=True, slots=True)
class _Form:
    """How calls are written: ``opening`` + JSON with name and arguments + ``closing``; or, where ``between`` is given,
    ``opening`` + name + ``between`` + arguments + ``closing``. White space does not count."""

    opening: str
    between: str | None
    closing: str
    pairs: _Pairs | None = None
    """How arguments are written that are no JSON."""
    wrapper: str = ""
    """What stands before the first of a turn's calls."""

    def read(self, text: str, tools: Sequence[Any]) -> Said:
        calls: list[dict[str, Any]] = []
        problems: list[str] = []
        first, place = len(text), 0
        for found in re.finditer(self._pattern, text):
            if found.start() < place:
                continue
            first = min(first, found.start())
            try:
                read, end = self._call(text, found, tools)
                calls += to_calls(read, "call")
            except (ValueError, RowError, RecursionError) as error:
                reason = re.sub(r"^`call`(?: is a function call|: )?", "", str(error)).strip()
                problems.append(f"a call could not be read ({reason}): {text[found.start() : found.start() + 200]}")
                end = len(text)
            place = end
        # What stands between calls is how they are written.
        before = text[:first].rstrip().removesuffix(self.wrapper)
        content = f"{before}{text[place:]}".strip() if calls or problems else text
        message: Message = {"role": "assistant", "content": text if problems and not calls else content}
        return Said({**message, "tool_calls": calls} if calls else message, tuple(problems))

    @property
    def _pattern(self) -> str:
        if self.between is not None:
            return rf"{_loose(self.opening)}\s*(?P<name>[\w.\-]+)\s*{_loose(self.between)}\s*"
        # Where nothing opens a call, it is all that there is; Llama's models write a token before it at times.
        bare = r"\A\s*(?:<\|python_tag\|>)?\s*(?=\{\s*\"(?:name|type|function)\")"
        return rf"{_loose(self.opening)}\s*" if self.opening else bare

    def _call(self, text: str, found: re.Match[str], tools: Sequence[Any]) -> tuple[Any, int]:
        """The call or calls at a place of the text, and where they end."""
        if self.pairs is not None:
            return self.pairs.call(text, found, self.closing, tools)
        value, end = json.JSONDecoder().raw_decode(text, found.end())
        if _MORE.match(text, end):
            raise ValueError("another call follows in the place of one")
        if closing := re.compile(rf"\s*{_loose(self.closing)}").match(text, end):
            end = closing.end()
        if self.between is not None:
            return {"name": found["name"], "arguments": value}, end
        calls = value if isinstance(value, list) else [value]
        return [_with_arguments(call) for call in calls], end


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Arguments one by one: ``opening`` + key + ``between`` + value + ``closing``, as GLM's and Qwen3-Coder's."""

    opening: str
    between: str
    closing: str

    def call(self, text: str, found: re.Match[str], closing: str, tools: Sequence[Any]) -> tuple[Any, int]:
        """The call whose name was found, and where it ends.

        Raises:
            ValueError: It has no end.
        """
        over = re.compile(_loose(closing)).search(text, found.end()) if closing else None
        if over is None:
            raise ValueError(f"it does not end with {closing.strip()}")
        pattern = rf"{_loose(self.opening)}\s*(.+?)\s*{_loose(self.between)}(.*?){_loose(self.closing)}"
        types = types_of_arguments(tools, found["name"])
        arguments = {
            key: value_of(value.strip("\n"), types.get(key, ()))
            for key, value in re.findall(pattern, text[found.end() : over.start()], re.DOTALL)
        }
        return {"name": found["name"], "arguments": arguments}, over.end()


class Harmony:
    """gpt-oss' channels: thoughts, calls and answers are messages of their own."""

    _MESSAGE = re.compile(
        r"(?:<\|start\|>assistant)?(?P<before>[^<]*)<\|channel\|>(?P<channel>\w+)(?P<behind>[^<]*)"
        r"(?:<\|constrain\|>[^<]*)?<\|message\|>(?P<said>.*?)(?=<\|end\|>|<\|call\|>|<\|return\|>|<\|start\|>|\Z)"
        r"(?:<\|(?:end|call|return)\|>)?",
        re.DOTALL,
    )

    def read(self, text: str, tools: Sequence[Any]) -> Said:
        thoughts, said, calls, problems = [], [], [], []
        for found in self._MESSAGE.finditer(text):
            called = re.search(r"to=(?:functions\.)?([\w.\-]+)", found["before"] + found["behind"])
            if called is None:
                (thoughts if found["channel"] == "analysis" else said).append(found["said"])
                continue
            try:
                calls += to_calls({"name": called[1], "arguments": json.loads(found["said"] or "{}")}, "call")
            except (ValueError, RecursionError) as error:
                problems.append(f"a call of {called[1]} could not be read ({error}): {found['said'][:200]}")
        message: Message = {"role": "assistant", "content": "".join(said)}
        if not (thoughts or said or calls):
            message["content"] = self._MESSAGE.sub("", text)
        if thoughts:
            message["thinking"] = "".join(thoughts)
        return Said({**message, "tool_calls": calls} if calls else message, tuple(problems))


def require_readable(chat: Chat, parser: str = "auto") -> None:
    """
    Args:
        parser: As ``CallReader``'s; one of vLLM's is taken at its word.

    Raises:
        RowError: What the template writes of a call would be read as something else.
    """
    if parser != "auto" or vars(chat.tokenizer).get("response_template") is not None:
        return
    properties = {name: {"type": type_, "description": "d"} for name, (type_, _) in _OF_EACH_TYPE.items()}
    parameters = {"type": "object", "properties": properties}
    tool = {**_TOOL, "function": {**_TOOL["function"], "parameters": parameters}}
    arguments = {name: value for name, (_, value) in _OF_EACH_TYPE.items()}
    call = {**_PROBE, "function": {"name": _NAME, "arguments": arguments}}
    render = chat.renderer([tool])
    try:
        prompt = render([QUESTION], generation_prompt=True)
        whole = render([QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except RowError:
        return
    turn = _special_end(chat, THOUGHT_ENDS.split(whole[_shared(prompt, whole) :])[-1])
    if _NAME not in turn:
        return
    read = [found["function"] for found in CallReader(chat).read(turn, [tool]).message.get("tool_calls", ())]
    if read != [call["function"]]:
        raise RowError(
            "the chat template writes calls in a form that cannot be told from it: name vLLM's parser for this model "
            f"as environment.call_parser, or set another model.chat_template. Of the arguments {json.dumps(arguments)} "
            f"were read: {json.dumps([function['arguments'] for function in read])}"
        )


def _with_arguments(call: Any) -> Any:
    """Llama's calls have ``parameters``."""
    if isinstance(call, dict) and "arguments" not in call and "parameters" in call:
        call = {("arguments" if key == "parameters" else key): value for key, value in call.items()}
    if isinstance(call, dict) and not isinstance(call.get("function", call), dict):
        raise RowError("`call` is a function call without a name")
    return call


def _form_of(chat: Chat) -> _Form | Harmony:
    if "<|channel|>" in template_text(chat.tokenizer.chat_template):
        return Harmony()
    hermes = _Form(_HERMES, None, "</tool_call>")
    render = chat.renderer([_TOOL])
    try:
        prompt = render([QUESTION], generation_prompt=True)
        one = render([QUESTION, {"role": "assistant", "content": "", "tool_calls": [_PROBE]}])
    except RowError:
        return hermes
    # A thought that the prompt opens, or the template puts before a call, is no part of the call.
    turn = THOUGHT_ENDS.split(one[_shared(prompt, one) :])[-1]
    written = _written(turn)
    if written is None:
        return _form_of_pairs(chat, turn) or hermes
    before, between, behind = written
    opening = _last_opening(chat, before, between)
    closing = _special_end(chat, behind)
    if "{" not in opening:
        wrapper = before[: len(before) - len(opening)].strip()
        return _Form(opening.strip(), between.strip(), closing.strip().removeprefix("}"), wrapper=wrapper)
    # The name is in an object of its own, perhaps in a list of them.
    return _Form(opening[: opening.index("{")].strip().removesuffix("[").strip(), None, closing.lstrip("}] \n").strip())


def _form_of_pairs(chat: Chat, turn: str) -> _Form | None:
    """The form of calls whose arguments are written one by one, if they are."""
    arguments = {"zqx": "xqz", "zqy": "yqz"}
    call = {**_PROBE, "function": {"name": _NAME, "arguments": arguments}}
    try:
        text = chat.renderer([_TOOL])([QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except RowError:
        return None
    if _NAME not in turn or _NAME not in text:
        return None
    found = re.search(rf"{_NAME}(.*?)zqx(.*?)xqz(.*?)zqy\2yqz(.*)\Z", text[text.rindex(_NAME) :], re.DOTALL)
    if found is None:
        return None
    first, between, gap, behind = found.groups()
    opening = _shared_end(first, gap)
    closing = gap[: len(gap) - len(opening)]
    end = _special_end(chat, behind.strip().removeprefix(closing.strip()))
    start = turn[: turn.index(_NAME)].strip()
    return _Form(start, first[: len(first) - len(opening)].strip(), end.strip(), _Pairs(opening, between, closing))


def _written(turn: str) -> tuple[str, str, str] | None:
    """What stands before the name, between it and the arguments, and behind these."""
    arguments = _ARGUMENTS_TEXT.search(turn)
    if arguments is None or _NAME not in turn[: arguments.start()]:
        return None
    start = turn.index(_NAME)
    return turn[:start], turn[start + len(_NAME) : arguments.start()], turn[arguments.end() :]


def _last_opening(chat: Chat, before: str, between: str) -> str:
    """What begins each of several calls: of what begins the first, that which the second has too."""
    calls = [_PROBE, {**_PROBE, "id": "zqxsecond"}]
    try:
        two = chat.renderer([_TOOL])([QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}])
    except RowError:
        return before
    parts = two.split(_NAME + between)
    if len(parts) < 3:
        return before
    gap = _ARGUMENTS_TEXT.sub("", parts[-2], count=1)
    opening = _shared_end(before, gap)
    # Of a list of calls, the second begins with a comma: the list is what is opened.
    return before if not re.sub(r'[\s{"\w:,\[]', "", opening) and re.sub(r'[\s{"\w:,\[]', "", before) else opening


def _shared(prompt: str, whole: str) -> int:
    """Where a turn begins behind its prompt, as far as the whole has it: a thought that it opens may be left out."""
    before = prompt[: len(prompt) - len(opened_tag(prompt))]
    differs = (index for index, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1])
    return next(differs, len(before))


def _shared_end(one: str, other: str) -> str:
    shared = 0
    while shared < min(len(one), len(other)) and one[-shared - 1] == other[-shared - 1]:
        shared += 1
    return one[len(one) - shared :]


def _special_end(chat: Chat, behind: str) -> str:
    """What ends a call, without what ends the turn."""
    ends = [chat.tokenizer.convert_ids_to_tokens(id_) for id_ in chat.end_ids]
    places = [behind.index(str(end)) for end in ends if str(end) in behind]
    return behind[: min(places)] if places else behind


def _loose(literal: str) -> str:
    """A pattern for a text in which white space does not count."""
    return r"\s*".join(re.escape(word) for word in literal.split())


def _with_calls(content: str, calls: Sequence[Any]) -> Said:
    message: Message = {"role": "assistant", "content": content}
    read = to_calls(list(calls), "call") if calls else []
    return Said({**message, "tool_calls": read} if read else message)


def _parted(text: str) -> tuple[str, str]:
    """The thought that a text begins with, its tags included, and what is behind it."""
    if ends := list(THOUGHT_ENDS.finditer(text)):
        return text[: ends[-1].end()], text[ends[-1].end() :]
    return (text, "") if THOUGHT_BEGINS.match(text.strip()[:20].split(">")[0] + ">") else ("", text)


def _by_schema(tokenizer: Any, text: str, prompt: str, tools: Sequence[Any]) -> Said:
    try:
        read = tokenizer.parse_response(text, prefix=prompt, tools=list(tools) or None)
    # What a schema of somebody else's makes of the policy's text may raise anything.
    except Exception as error:
        raise RowError(f"a call could not be read ({error}): {text[:200]}") from error
    said = _with_calls(read.get("content") or "", read.get("tool_calls") or ())
    thoughts = {key: read[key] for key in ("thinking", "reasoning_content") if read.get(key)}
    return Said({**said.message, **thoughts})
