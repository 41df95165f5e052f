"""Pictures that environments and tools would show, which they cannot: refused by name, never put into words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlflow.data.chat import Chat
from rlflow.data.errors import RowError
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.image_rows import keep_places
from rlflow.data.tokenizer import load_tokenizer
from rlflow.data.transcript import Transcript
from rlflow.environments.protocol import Reply
from rlflow.environments.session import Session
from rlflow.environments.tools import ToolEnvironment
from rlflow.recipe import ModelBlock
from rlflow.types import Completion
from tests.vision_models import picture, write_processor

PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


class Showing:
    def reset(self, row: Any) -> Any:
        return row.get("begins")

    def step(self, message: Any) -> Any:
        return Reply([{"role": "user", "content": [{"type": "text", "text": "look"}, PART]}])


def screenshot() -> Any:
    return Image.new("RGB", (4, 4))


def encoded() -> Any:
    return ["done", picture(4, 4)]


def test_an_environment_that_answers_with_a_picture_is_told_so():
    session = Session(Showing)
    assert session.answer("reset", {}, 0) == {"messages": None}
    assert "step returned a picture: an episode has those of its row alone" in session.answer("step", {})["error"]
    begins = {"begins": [{"role": "user", "content": [PART]}]}
    assert "reset returned a picture" in session.answer("reset", begins, 0)["error"]


@pytest.mark.parametrize("tool", [screenshot, encoded])
def test_a_tool_that_returns_a_picture_is_an_environments_fault_and_no_text_for_the_policy(tool: Any):
    session = Session(lambda: ToolEnvironment([tool]))
    session.answer("reset", {}, 0)
    call = {"function": {"name": tool.__name__, "arguments": {}}}
    said = session.answer("step", {"role": "assistant", "content": "", "tool_calls": [call]})
    assert said == {"error": said.get("error")}
    assert f"the tool {tool.__name__} returned a picture: what tools say is text" in said["error"]


def test_an_environment_that_begins_with_its_rows_messages_shows_their_pictures():
    images = (picture(8, 8, 1), picture(8, 8, 2))
    messages = [{"role": "system", "content": "Look."}, {"role": "user", "content": "<image> and <image>"}]
    kept, shown = keep_places(messages, images)
    assert kept == [messages[0], {**messages[1], "images": 2}] and shown == images
    assert keep_places([{"role": "user", "content": "Go"}], images) == ([{"role": "user", "content": "Go"}], ())
    with pytest.raises(RowError, match="it begins with 1 <image>, and its row has 2 pictures"):
        keep_places([{"role": "user", "content": "<image>"}], images)


def test_what_is_said_with_the_placeholder_of_a_picture_in_it_is_refused(tmp_path: Path):
    """Idefics3's placeholder is `<image>` itself: an engine would look for a picture."""
    write_processor(tmp_path, "idefics3")
    tokenizer, vision = load_tokenizer(ModelBlock(path=str(tmp_path))), ImageProcessor(str(tmp_path))
    chat = Chat(tokenizer, vision=vision)
    messages = [{"role": "user", "content": "Go"}]
    ids = chat.encode([chat.render_prompt(messages)])[0]
    stop = tokenizer.eos_token_id
    written = np.array([*tokenizer(" Yes").input_ids, stop], dtype=np.int32)
    zeros = np.zeros(len(written), dtype=np.float32)
    for said, problem in (("fine", None), ("an <image> tag", "what was said holds <image>, the place of a picture")):
        transcript = Transcript(chat, [stop], messages, [], ids)
        completion = Completion(0, written, zeros, zeros.astype(np.int32), "stop")
        transcript.wrote(completion, {"role": "assistant", "content": "Yes"})
        if problem is None:
            assert transcript.heard([{"role": "user", "content": said}]) > 0
            continue
        with pytest.raises(RowError, match=problem):
            transcript.heard([{"role": "user", "content": said}])
