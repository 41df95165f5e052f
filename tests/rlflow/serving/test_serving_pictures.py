"""Pictures in `rlflow infer` and `rlflow serve`: what is answered to them is what transformers' generate answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlflow.data.errors import RowError
from rlflow.data.prompts import load_prompts
from rlflow.data.vocabulary import placeholder_ids
from rlflow.recipe import DataBlock, SourceBlock
from rlflow.serving.batch import Job, answer_prompts
from rlflow.serving.conversation import Answer, Conversation
from rlflow.serving.models import ServedModel, Settings, open_streams, read_model
from rlflow.serving.sampling import Sampling
from rlflow.serving.streams import Streams
from tests.rlflow.serving.conftest import running, server_of, source_of
from tests.seeing_models import FAMILIES, write_seeing_model


def plain(width: int, height: int, colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


FIRST, SECOND = plain(40, 24, "white"), plain(24, 40, "black")
SETTINGS = Settings(max_model_len=160, max_num_seqs=4)
GREEDY = Sampling(0.0, max_new_tokens=6)


def uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def served(seeing: Path) -> ServedModel:
    return read_model(source_of(seeing, "seeing"), SETTINGS)


@pytest.fixture(scope="module")
def streams(served: ServedModel) -> Iterator[Streams]:
    opened = open_streams(served, "torch", {}, SETTINGS)
    yield opened
    opened.close()


class Oracle:
    """transformers alone: its processor, its template, its greedy search."""

    def __init__(self, directory: Path, served: ServedModel) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(directory)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(directory).eval()
        self.never = placeholder_ids(self.model.config)
        self.stops = list(served.stop_token_ids)

    def answer(self, messages: Sequence[dict[str, Any]], images: Sequence[bytes], max_new_tokens: int = 6) -> str:
        """The text that follows messages whose contents are parts, pictures among them."""
        text = self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        shown = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        inputs = self.processor(text=[text], images=shown or None, add_special_tokens=False, return_tensors="pt")
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
        with torch.no_grad():
            written = self.model.generate(**inputs, suppress_tokens=self.never, eos_token_id=self.stops, **options)
        ids = written[0, inputs["input_ids"].shape[1] :]
        # An answer that is cut within a character is shown without it.
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


@pytest.fixture(scope="module")
def oracle(seeing: Path, served: ServedModel) -> Oracle:
    return Oracle(seeing, served)


def said(*parts: str | None, role: str = "user") -> dict[str, Any]:
    """A message of text and, where there is None, of a picture."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def test_answers_to_a_data_set_of_pictures_are_those_of_transformers_and_keep_the_pictures(
    served: ServedModel, streams: Streams, oracle: Oracle, tmp_path: Path
) -> None:
    (tmp_path / "first.png").write_bytes(FIRST)
    rows = [
        {"prompt": "What is <image> and <image>?", "images": ["first.png", uri(SECOND)]},
        {"prompt": "And this?"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image"}]}]}
        | {"images": ["first.png"], "prompt": None},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    (tmp_path / "parts.jsonl").write_text(f"{json.dumps(rows[2])}\n")
    sources = [SourceBlock(path=str(tmp_path / name)) for name in ("rows.jsonl", "parts.jsonl")]
    prompts = load_prompts(sources, DataBlock(train=sources[0]), served.tokenizer, 0, vision=served.vision)
    found = answer_prompts(prompts, Job(served, "seeing", GREEDY, 1, (), 4), streams, None, lambda done, total: None)
    answered = [row for of_some, _ in found for row in of_some]
    assert [row["response"] for row in answered] == [
        oracle.answer([said("What is ", None, " and ", None, "?")], [FIRST, SECOND]),
        oracle.answer([said("And this?")], []),
        oracle.answer([said("Look", None)], [FIRST]),
    ]
    assert answered[0]["response"] != oracle.answer([said("What is ", None, " and ", None, "?")], [SECOND, FIRST])
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in answered))
    again = load_prompts(
        SourceBlock(path=str(path)), DataBlock(train=sources[0]), served.tokenizer, 0, vision=served.vision
    )
    for before, after in zip(prompts, again, strict=True):
        assert np.array_equal(before.token_ids, after.token_ids) and before.images == after.images


def test_a_picture_that_a_request_holds_is_answered_as_by_transformers(
    served: ServedModel, streams: Streams, oracle: Oracle
) -> None:
    openai = pytest.importorskip("openai")
    shown = {"type": "image_url", "image_url": {"url": uri(FIRST)}}
    conversation: list[Any] = [
        {"role": "user", "content": [shown, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A sign"},
        {"role": "user", "content": "And <image>?"},
    ]
    expected = oracle.answer([said(None, "What?")], [FIRST])
    with running(server_of(served, streams)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

        def ask(messages: Any) -> str:
            options = {"temperature": 0, "max_tokens": 6}
            return (
                client.chat.completions.create(model="seeing", messages=messages, **options).choices[0].message.content
            )

        assert ask(conversation[:1]) == expected
        history = [said(None, "What?"), said("A sign", role="assistant"), said("And <image>?")]
        if oracle.processor.image_token == "<image>":
            with pytest.raises(openai.BadRequestError, match="it has 1 picture, and the text that the chat template"):
                ask(conversation)
        else:
            assert ask(conversation) == oracle.answer(history, [FIRST])
        for address, reason in {
            "/etc/hostname": "reads no files of its machine",
            "file:///etc/hostname": "reads no files of its machine",
            "http://127.0.0.1/a.png": "fetches nothing",
            "data:image/png;base64,aGVsbG8=": "no picture in a format that Pillow knows",
        }.items():
            part = {"type": "image_url", "image_url": {"url": address}}
            with pytest.raises(openai.BadRequestError, match=reason) as refused:
                ask([{"role": "user", "content": [part]}])
            assert "messages[0].content[0]" in str(refused.value)
        clip = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8="}}
        with pytest.raises(openai.BadRequestError, match="this server decodes no videos: send the frames that matter"):
            ask([{"role": "user", "content": [clip]}])
        tagged = [{"role": "user", "content": [shown, {"type": "text", "text": "<video>?"}]}]
        if served.vision is not None and not served.vision.takes_videos:
            assert ask(tagged) == oracle.answer([said(None, "<video>?")], [FIRST])
        with pytest.raises(openai.BadRequestError, match="send the picture itself"):
            ask([{"role": "user", "content": [{"type": "image"}]}])


def test_a_chat_shows_a_picture_with_the_next_message_and_goes_on_knowing_it(
    served: ServedModel, streams: Streams, oracle: Oracle, tmp_path: Path
) -> None:
    (tmp_path / "a picture.png").write_bytes(FIRST)
    talk = Conversation(served, None)
    talk.show(str(tmp_path / "a picture.png"))
    with pytest.raises(RowError, match="its text has 2 <image>s"):
        talk.prompt("<image><image>")
    asked = talk.prompt("What?")
    answer = Answer(served, streams, "seeing", asked, GREEDY, 0)
    first = "".join(answer)
    assert first == oracle.answer([said(None, "What?")], [FIRST])
    talk.add("What?", first, asked.opened)
    second = "".join(Answer(served, streams, "seeing", talk.prompt("Why?"), GREEDY, 0))
    history = [said(None, "What?"), said(first, role="assistant"), said("Why?")]
    assert second == oracle.answer(history, [FIRST])
    with pytest.raises(RowError, match="there is no file"):
        talk.show("nothing.png")
    talk.clear()
    assert talk.prompt("Why?").images == ()
