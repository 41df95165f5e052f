"""A chat, as the terminal and a pipe have it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from rlflow.actors.rollout_engines.scripted_engine import ScriptedEngine
from rlflow.data.chat import Chat
from rlflow.data.tokenizer import build_character_tokenizer
from rlflow.driver.errors import RunError
from rlflow.serving.conversation import Conversation
from rlflow.serving.models import ServedModel
from rlflow.serving.sampling import Sampling
from rlflow.serving.streams import Streams
from rlflow.serving.terminal import PlainScreen, converse, printable
from rlflow.types import SampleRequest
from tests.conftest import CHARACTERS, CHAT_TEMPLATE
from tests.rlflow.serving.conftest import CONTEXT, Oracle

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@dataclass
class ScriptedScreen:
    """Somebody who types lines; Ctrl-C where a line is None, or after so many pieces of an answer."""

    lines: list[str | None]
    interrupt_after: int = -1
    said: str = ""
    thought: str = ""
    notes: list[str] = field(default_factory=list)

    def ask(self) -> str | None:
        if not self.lines:
            return None
        line = self.lines.pop(0)
        if line is None:
            raise KeyboardInterrupt
        return line

    def show(self, text: str, *, is_thought: bool) -> None:
        self.said, self.thought = self.said + text * (not is_thought), self.thought + text * is_thought
        self.interrupt_after -= 1
        if self.interrupt_after == 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.said += "|"

    def note(self, text: str) -> None:
        self.notes.append(text)

    def refuse(self, reason: str) -> None:
        self.notes.append(reason)


def chat(
    model: ServedModel, streams: Streams, lines: Sequence[str | None], sampling: Sampling = GREEDY, **screen: Any
) -> tuple[ScriptedScreen, Conversation]:
    seen, conversation = ScriptedScreen(list(lines), **screen), Conversation(model, None)
    converse(conversation, streams, "tiny", sampling, seen)
    return seen, conversation


def test_each_answer_is_to_the_whole_conversation(served: ServedModel, streams: Streams, oracle: Oracle) -> None:
    seen, conversation = chat(served, streams, ["2+3=", "", "and 4?", "/exit", "never said"])
    messages: list[dict[str, str]] = []
    for question in ("2+3=", "and 4?"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": oracle.answer(messages, 12)})
    assert conversation.messages == messages
    assert seen.said == "".join(f"{messages[i]['content']}|" for i in (1, 3))
    assert all("cut after 12 tokens: --max-new-tokens" in note for note in seen.notes)


def test_clear_forgets_and_system_is_put_before(served: ServedModel, streams: Streams, oracle: Oracle) -> None:
    lines = ["2+3=", "/clear", "1+1=", "/system Add.", "1+1=", "/system", "/system -", "/system", "1+1=", "/what is?"]
    seen, _ = chat(served, streams, lines)
    question = [{"role": "user", "content": "1+1="}]
    plain, with_system = (oracle.answer([*m, *question], 12) for m in ([], [{"role": "system", "content": "Add."}]))
    assert plain != with_system
    assert seen.said.split("|")[1:] == [plain, with_system, plain, ""]
    assert "Add." in seen.notes and "there is no system prompt" in seen.notes
    assert seen.notes[-1].startswith("/what: there is no such command; /help lists them")


def test_a_conversation_that_is_too_long_is_said_and_goes_on_after_clear(
    served: ServedModel, streams: Streams, oracle: Oracle
) -> None:
    seen, conversation = chat(served, streams, ["1" * CONTEXT, "/clear", "1+1="])
    assert any("tokens, and the model reads 160 with its answer" in note for note in seen.notes)
    assert len(conversation.messages) == 2
    assert seen.said == oracle.answer([{"role": "user", "content": "1+1="}], 12) + "|"
    longest, _ = chat(served, streams, ["1" * (CONTEXT - 24)], replace(GREEDY, max_new_tokens=None))
    assert "with its answer; /clear begins anew" in seen.notes[0]
    assert "the model's context is full, /clear begins anew" in longest.notes[0]


def test_a_message_that_the_tokenizer_cannot_read_is_said(served: ServedModel, streams: Streams) -> None:
    seen, conversation = chat(served, streams, ["é"])
    assert len(CHARACTERS) > 40
    assert seen.notes == [f"the character 'é' is not in model.characters, {CHARACTERS[:40]!r} and more"]
    assert conversation.messages == []


def test_ctrl_c_stops_an_answer_and_ctrl_c_at_the_prompt_leaves(
    served: ServedModel, streams: Streams, oracle: Oracle
) -> None:
    question = [{"role": "user", "content": "2+3="}]
    seen, conversation = chat(served, streams, ["2+3=", None, "never said"], interrupt_after=2)
    written = conversation.messages[1]["content"]
    assert oracle.answer(question, 12).startswith(written) and len(written) >= 2
    assert seen.notes == ["stopped; Ctrl-C once more leaves"]
    assert len(conversation.messages) == 2


def test_ctrl_c_leaves_whatever_else_is_under_way(served: ServedModel, streams: Streams) -> None:
    class Impatient(ScriptedScreen):
        def note(self, text: str) -> None:
            raise KeyboardInterrupt

    screen = Impatient(["/clear", "never said"])
    converse(Conversation(served, None), streams, "tiny", GREEDY, screen)
    assert screen.lines == ["never said"]


def test_a_seed_makes_a_chat_repeat(served: ServedModel, streams: Streams) -> None:
    def said(seed: int | None) -> str:
        return chat(served, streams, ["2+3=", "2+3="], Sampling(1.0, max_new_tokens=16, seed=seed))[0].said

    assert said(3) == said(3)
    assert len({said(3), said(4), said(None), said(None)}) == 4


class WritingEngine(ScriptedEngine):
    """Writes a given text, a token a step."""

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__(4, length=lambda request: len(token_ids))
        self.text = np.array(token_ids, dtype=np.int32)
        self.load_weights([], 0)

    def written(self, seen: Any) -> Any:
        newer = super().written(seen)
        return {id: new._replace(token_ids=self.text[seen[id] :][: len(new.token_ids)]) for id, new in newer.items()}

    def _completion(self, row: Any, reason: Any = None) -> Any:
        return replace(super()._completion(row, reason), token_ids=self.text[: len(row.versions)])


def test_thoughts_are_shown_apart_and_kept_for_the_next_turn(served: ServedModel) -> None:
    tokenizer = build_character_tokenizer(CHARACTERS + "<>", CHAT_TEMPLATE)
    model, text = replace(served, tokenizer=tokenizer, chat=Chat(tokenizer)), "<think>2 and 3</think> so 5"
    streams = Streams({"tiny": WritingEngine(tokenizer(text, add_special_tokens=False).input_ids)})
    seen, conversation = chat(model, streams, ["2+3="])
    streams.close()
    assert (seen.thought, seen.said) == ("<think>2 and 3</think>", " so 5|")
    assert conversation.messages[1]["content"] == text


def test_a_pipe_gets_answers_alone_on_its_output(served: ServedModel, streams: Streams, oracle: Oracle) -> None:
    output = io.StringIO()
    screen = PlainScreen(io.StringIO("2+3=\n\n/clear\n1+1="), output)
    converse(Conversation(served, None), streams, "tiny", GREEDY, screen)
    answers = [oracle.answer([{"role": "user", "content": question}], 12) for question in ("2+3=", "1+1=")]
    assert output.getvalue() == "".join(f"{answer}\n" for answer in answers)


def test_a_message_over_a_pipe_without_an_answer_is_counted_and_leaves_its_line_empty(
    served: ServedModel, streams: Streams, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    output = io.StringIO()
    screen = PlainScreen(io.StringIO("\né?\n1+\udce9\n/system \udce9\n1+1=\n"), output)
    converse(Conversation(served, None), streams, "tiny", GREEDY, screen)
    assert output.getvalue() == f"\n\n\n{oracle.answer([{'role': 'user', 'content': '1+1='}], 12)}\n"
    assert screen.num_refused == 3
    lacking, broken, *_ = capsys.readouterr().err.splitlines()
    assert lacking.startswith("line 2 has no answer: the character 'é'") and "/clear" not in lacking
    assert broken == "line 3 has no answer: what follows '1+' is no UTF-8 text"


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\r\x9bc\n\td 👩‍👧é") == "a[31mbc\n\td 👩‍👧é"


def test_a_failing_engine_ends_the_chat_with_its_reason(served: ServedModel) -> None:
    class Failing(ScriptedEngine):
        def add(self, requests: Sequence[SampleRequest]) -> None:
            raise MemoryError("no room")

    engine = Failing(4)
    streams = Streams({"tiny": engine})
    with pytest.raises(RunError, match="MemoryError: no room"):
        chat(served, streams, ["2+3="])
    streams.close()


def test_a_line_over_a_pipe_that_is_no_command_has_an_empty_line_and_is_counted(
    served: ServedModel, streams: Streams, capsys: pytest.CaptureFixture[str]
) -> None:
    output = io.StringIO()
    screen = PlainScreen(io.StringIO("/etc/hosts, what is it?\n"), output)
    converse(Conversation(served, None), streams, "tiny", GREEDY, screen)
    assert (output.getvalue(), screen.num_refused) == ("\n", 1)
    assert capsys.readouterr().err.startswith("line 1 has no answer: /etc/hosts,: there is no such command")
