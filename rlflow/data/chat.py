"""Messages to text by the chat template, and which parts of the text are trained.

The template decides the text, so it also decides where an answer begins and ends. An assistant turn is trained

    from    the end of the generation prompt before it, which is where the policy starts to write,
    to      the end-of-turn token behind it, included; what the template puts behind that is not trained.

A template that ends no turn gets a stop behind the last answer: the marker of the role that speaks next, where that
is a token (GLM's models stop at it), or else eos.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import date
from typing import TYPE_CHECKING, Any

from rlflow.data.call_ids import with_ids
from rlflow.data.calls import function_name, is_python, renamed, with_other_names, with_text_arguments
from rlflow.data.encoding import Encoder, Rendered
from rlflow.data.errors import DataError, RowError
from rlflow.data.messages import parts_of, shown_tags
from rlflow.data.shown import left_out, with_thought
from rlflow.data.template import clock_at, names_read, template_text
from rlflow.data.thoughts import keys_read, under_read_keys
from rlflow.data.turns import MARKER, Render, Turn, find_turns
from rlflow.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rlflow.data.image_processor import ImageProcessor

EMPTY_THINK = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
"""Some generation prompts hold the opening tag already."""
QUESTION: Message = {"role": "user", "content": "Hi"}
EXCHANGE: list[Message] = [QUESTION, {"role": "assistant", "content": MARKER}]
NEXT: tuple[Message, ...] = (QUESTION, {"role": "tool", "content": "1"})
"""Who may speak after the assistant."""


class Chat:
    """A tokenizer with its chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, day: date | None = None, vision: ImageProcessor | None = None
    ) -> None:
        """
        Args:
            tokenizer: With its template.
            day: What the template writes where it writes the date; the day of the call when absent.
            vision: Of a model that takes pictures.
        """
        self.tokenizer = tokenizer
        self.vision = vision
        self._settings: dict[str, Any] = {} if day is None else {"strftime_now": clock_at(day)}
        self._template = template_text(tokenizer.chat_template)
        self._thought_keys = keys_read(self._template)
        self._wants_parts = bool(self._template) and self._hides_text()
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._special_token = re.compile(names or r"(?!)")
        self._closing, markers = self._find_closing(names) if self._template else ("", [])
        self._stop: str = next(iter(markers), str(tokenizer.eos_token or ""))
        self._generation_prompt = self._find_generation_prompt() if self._template else ""
        closing = self._special_token.findall(self._closing)[-1:]
        ends = (tokenizer.eos_token_id, *(special[name] for name in (*closing, *markers)))
        self.end_ids = tuple(sorted({token for token in ends if isinstance(token, int)}))
        """eos and the chat template's end of turn."""
        self._characters = only_characters(tokenizer)
        self._encoder = Encoder(tokenizer, self.end_ids)
        self.encode = self._encoder.encode
        self.encode_trained = self._encoder.encode_trained
        self.encode_with_offsets = self._encoder.encode_with_offsets

    @property
    def has_template(self) -> bool:
        return bool(self._template)

    def render_prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Rendered:
        """The text up to where the policy starts to write.

        Raises:
            RowError: the template refuses the messages or leaves out what they say, or a character tokenizer lacks
                one of their characters.
        """
        render = self.renderer(tools, generation_prompt=True)
        text = self.check_characters(render(messages))
        self.require_calls_and_tools(messages, tools, generation_prompt=True)
        notes = left_out(messages, (), render)
        return Rendered(text, starts=self._starts(text, messages, render), notes=tuple(notes))

    def render_whole(self, messages: Sequence[Message]) -> Rendered:
        """A conversation that is read and not trained, as ``transformers`` renders it.

        Raises:
            RowError: the template refuses the messages, or a character tokenizer lacks one of their characters.
        """
        render = self.renderer(None)
        text = self.check_characters(render(messages))
        return Rendered(text, starts=self._starts(text, messages, render))

    def render_conversation(
        self,
        messages: Sequence[Message],
        turns: Collection[int] | None,
        tools: list[Any] | None = None,
        *,
        ignore_empty_think: bool = False,
        written: bool = True,
    ) -> Rendered:
        """The whole text, with the assistant turns of these indices trained; all of the text when ``turns`` is None.

        Args:
            messages: The conversation.
            turns: Indices into it.
            tools: Functions that the assistant may call.
            ignore_empty_think: An empty thought at the start of a turn is not trained.
            written: The policy is to write such turns: the last one begins behind the generation prompt, and every
                one that is trained ends with a stop. A reward model reads them as the template has them.

        Raises:
            RowError: as ``render_prompt``; the template renders a turn so that it cannot be found in the text, or a
                turn would be trained without what the policy has before it and the stop behind it.
            DataError: there is no token to stop at.
        """
        render = self.renderer(tools)
        text = render(messages)
        self.require_calls_and_tools(messages, tools)
        last = len(messages) - 1
        answers = {index for index, message in enumerate(messages) if message["role"] == "assistant"}
        trained = answers if turns is None else set(turns)
        places = self._find_turns(text, messages, turns or (), render)
        if written and last in trained & places.keys():
            text, places[last] = self._behind_its_prompt(text, messages, places[last], render)
        ends = {}
        for index in trained & places.keys():
            calls = "tool_calls" in messages[index]
            text, ends[index] = self._closed(
                text, index, places[index].end, written, is_last=index == last, is_call=calls
            )
        self.check_characters(text)
        said = text[places[last].start : places[last].end] if last in places else ""
        notes = left_out(messages, trained, render, said, lambda: names_read(self._template))
        starts = tuple(sorted(turn.start for turn in places.values()))
        if turns is None:
            return Rendered(text, ((0, len(text)),), starts, tuple(notes))
        spans, as_prompted = [], True
        for index in sorted(trained):
            start, end = places[index].start, ends[index]
            if written and not places[index].follows_prompt:
                as_prompted = False
                notes.append(f"what the policy will have before messages[{index}] is rendered otherwise than here")
            if ignore_empty_think and (empty := EMPTY_THINK.match(text, start, end)):
                start = empty.end()
            spans.append((start, end))
        return Rendered(text, tuple(spans), starts, tuple(notes), as_prompted)

    def render_text(self, text: str, *, complete: bool) -> Rendered:
        """Plain text behind the bos token, where the tokenizer has that habit; ``complete`` ends it with eos. A row
        that has them already gets no second one.

        Raises:
            RowError: a character tokenizer lacks one of its characters.
            DataError: there is no eos token.
        """
        tokenizer = self.tokenizer
        if complete and tokenizer.eos_token is None:
            raise DataError(
                "the tokenizer has no eos token to end a text with. Set eos_token in tokenizer_config.json."
            )
        bos, eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
        begins = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        before = bos if begins and not text.startswith(bos) else ""
        behind = eos if complete and not text.endswith(eos) else ""
        text = f"{before}{self.check_characters(text)}{behind}"
        return Rendered(text, ((0, len(text)),))

    def _behind_its_prompt(
        self, text: str, messages: Sequence[Message], turn: Turn, render: Render
    ) -> tuple[str, Turn]:
        """The text with the last turn behind the generation prompt, where the template does not repeat that.

        DeepSeek-R1's prompt opens a thought, and its template cuts thoughts: the thought goes behind the prompt.

        Raises:
            RowError: the generation prompt opens a thought, and the turn has none.
        """
        if turn.follows_prompt:
            return text, turn
        last = len(messages) - 1
        prompt = render(messages[:last], generation_prompt=True)
        differs = (index for index, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1])
        shared = next(differs, len(text))
        if not prompt[shared:].strip():
            # The two part in white space alone, such as that of an empty thought.
            return prompt + text[shared:], _moved(turn, len(prompt), len(prompt) - shared)
        if shared < turn.content:
            return text, turn
        opened = prompt[turn.content :]
        said = with_thought(messages[last], text[turn.content : turn.end])
        if opened.strip() and said.lstrip().startswith(opened.strip()):
            said = said.lstrip().removeprefix(opened.strip()).removeprefix(opened[len(opened.rstrip()) :])
        elif opened.count("<think>") > opened.count("</think>"):
            raise RowError(
                f"the generation prompt opens a thought ({opened.strip()!r}), and messages[{last}] has none: give it "
                "one, or set a model.chat_template (or model.chat_template_kwargs) that opens none"
            )
        longer = len(prompt) + len(said) - turn.end
        return prompt + said + text[turn.end :], _moved(turn, len(prompt), longer)

    def _closed(
        self, text: str, index: int, end: int, written: bool, *, is_last: bool, is_call: bool
    ) -> tuple[str, int]:
        """The text with an end of the turn behind ``end``, and where that ends.

        A call may have an end of its own (Llama 3's ``<|eom_id|>``, gpt-oss' ``<|call|>``), of which
        generation_config.json tells.
        """
        if self._closing and text.startswith(self._closing, end):
            return text, end + len(self._closing)
        if not written:
            return text, end
        token = self._special_token.match(text, end)
        if token and (is_call or self.tokenizer.convert_tokens_to_ids(token[0]) in self.end_ids):
            return text, token.end()
        if not is_last:
            closing = f"{token[0]}, at which the policy does not" if token else "nothing that the policy could"
            raise RowError(
                f"the chat template ends messages[{index}] with {closing} stop at: train the last "
                "turn alone (data.loss_on: last_assistant), which eos ends, or set a model.chat_template that ends "
                "every answer with {{ eos_token }}"
            )
        if not self._stop:
            raise DataError(
                "neither the chat template nor the tokenizer has a token that ends an answer. Set eos_token in "
                "tokenizer_config.json."
            )
        return text[:end] + self._stop, end + len(self._stop)

    def _starts(self, text: str, messages: Sequence[Message], render: Render) -> tuple[int, ...]:
        turns = self._find_turns(text, messages, (), render)
        return tuple(sorted(turn.start for turn in turns.values()))

    def _find_turns(
        self, text: str, messages: Sequence[Message], wanted: Collection[int], render: Render
    ) -> dict[int, Turn]:
        return find_turns(text, messages, wanted, render, self._generation_prompt, self._special_token)

    def renderer(self, tools: list[Any] | None, *, generation_prompt: bool = False) -> Render:
        """What renders conversations with these tools, and asks the policy to go on where nothing else is said."""

        def render(
            messages: Sequence[Message], *, generation_prompt: bool = generation_prompt, **variables: Any
        ) -> str:
            return self._render(messages, tools, generation_prompt=generation_prompt, **variables)

        return render

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, **variables: Any) -> str:
        """Calls have the ids that they have; a template that refuses those, or calls without, gets others."""
        if not any("tool_calls" in message or message["role"] == "tool" for message in messages):
            return self._apply(messages, tools, **variables)
        try:
            return self._render_calls(messages, tools, **variables)
        except RowError:
            with suppress(RowError):
                return self._render_calls(with_ids(messages), tools, **variables)
            raise

    def _render_calls(self, messages: Sequence[Message], tools: list[Any] | None, **variables: Any) -> str:
        """Arguments of calls are objects; a template that cannot write those gets them as JSON text."""
        as_text = with_text_arguments(messages)
        try:
            text = self._apply(messages, tools, **variables)
        except RowError:
            with suppress(RowError):
                return self._apply(as_text, tools, **variables)
            raise
        printed = is_python(messages, text, lambda other: self._apply(other, tools, **variables))
        return self._apply(as_text, tools, **variables) if printed else text

    def _apply(
        self, messages: Sequence[Message], tools: list[Any] | None, *, generation_prompt: bool, **variables: Any
    ) -> str:
        from jinja2 import TemplateError

        if not self._template:
            raise DataError(
                "the tokenizer has no chat template. Set model.chat_template, or `format: text` in the data source "
                "when the rows are plain text (rlflow infer, serve and eval: give --chat-template FILE)."
            )
        try:
            text = self.tokenizer.apply_chat_template(
                under_read_keys([self._for_template(message) for message in messages], self._thought_keys),
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._settings,
                **variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text

    def _for_template(self, message: Message) -> Message:
        """The message with its pictures, or where the template reads nothing else its text, as content parts."""
        tags = shown_tags(message)
        if not tags and not self._wants_parts:
            return message
        return {**message, "content": parts_of(message["content"], tags)}

    def _hides_text(self) -> bool:
        """Whether the template shows nothing of a content that is text: Idefics3's goes over a list of parts."""
        self._wants_parts = False
        try:
            return MARKER not in self.renderer(None)([{**QUESTION, "content": MARKER}])
        except (RowError, DataError):
            return False

    def require_calls_and_tools(
        self, messages: Sequence[Message], tools: list[Any] | None, *, generation_prompt: bool = False
    ) -> None:
        """Renders them once more under other names: theirs may be in the text for another reason.

        Raises:
            RowError: The template does not show a tool, or leaves out a call.
        """
        if not tools and not any("tool_calls" in message for message in messages):
            return
        described = [renamed(tool, f"described_{number}") for number, tool in enumerate(tools or ())]
        called = with_other_names(messages)
        text = self.renderer(described or None, generation_prompt=generation_prompt)(called)
        if not all(function_name(tool) in text for tool in described):
            shows = "set a model.chat_template that does"
            raise RowError(f"it has `tools`, which the chat template does not show to the policy: {shows}")
        if not all(function_name(call) in text for message in called for call in message.get("tool_calls", ())):
            raise RowError("it has function calls, which the chat template leaves out")

    def _find_closing(self, special: str) -> tuple[str, list[str]]:
        """The special tokens behind the last answer, as text; where there are none, those that open the next turn."""
        render = self.renderer(None)
        try:
            behind = render(EXCHANGE).partition(MARKER)[2]
        except RowError as error:
            raise DataError(
                f"a question and an answer cannot be rendered: {error}. Set model.chat_template."
            ) from error
        closing = re.match(rf"\s*(?:{special})+", behind) if special else None
        markers = []
        for message in () if closing else NEXT:
            with suppress(RowError):
                if token := self._special_token.match(render([*EXCHANGE, message]).partition(MARKER)[2]):
                    markers.append(token[0])
        return closing[0] if closing else "", markers

    def _find_generation_prompt(self) -> str:
        """What the template puts behind a question for the policy to go on from; empty where that cannot be told."""
        try:
            plain, asked = (self.renderer(None, generation_prompt=asked)([QUESTION]) for asked in (False, True))
        except RowError:
            return ""
        return asked[len(plain) :] if asked.startswith(plain) else ""

    def check_characters(self, text: str) -> str:
        """The text, of whose characters a character tokenizer lacks none.

        Raises:
            RowError: It lacks one.
        """
        if self._characters is not None:
            bare = re.sub("|".join(map(re.escape, self.tokenizer.all_special_tokens)), "", text)
            unknown = [character for character in bare if character not in self._characters]
            if unknown:
                ids = self.tokenizer.get_vocab()
                known = "".join(sorted((token for token in ids if len(token) == 1), key=ids.__getitem__))
                listed = f"{known[:40]!r}{' and more' * (len(known) > 40)}"
                raise RowError(f"the character {unknown[0]!r} is not in model.characters, {listed}")
        return text


def _moved(turn: Turn, start: int, by: int) -> Turn:
    """A turn that begins at ``start``, behind its prompt, and ends ``by`` characters later than before."""
    return Turn(start, start, turn.end + by, follows_prompt=True)


def only_characters(tokenizer: PreTrainedTokenizerFast) -> set[str] | None:
    """The characters of a character tokenizer, which has no token for any other; None of every other tokenizer."""
    from tokenizers.models import WordLevel

    model = tokenizer.backend_tokenizer.model
    vocabulary = set(tokenizer.get_vocab())
    return vocabulary if isinstance(model, WordLevel) and model.unk_token not in vocabulary else None
