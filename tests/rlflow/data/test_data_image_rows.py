"""Rows with pictures to prompts, examples and pairs, against the tokens of transformers' own processors."""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlflow.data.control_texts import ControlTexts
from rlflow.data.errors import DataError, RowError
from rlflow.data.examples import load_examples
from rlflow.data.formats import Record, to_record
from rlflow.data.image_processor import ImageProcessor
from rlflow.data.preferences import load_labelled, load_pairs
from rlflow.data.prompts import load_prompts
from rlflow.data.sources import Row
from tests.vision_models import picture, write_processor

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the Qwen-VL processors need torchvision"
)
FAMILIES = [
    pytest.param("qwen3_vl", marks=needs_torchvision),
    pytest.param("qwen2_5_vl", marks=needs_torchvision),
    "idefics3",
]
FIRST, SECOND = picture(60, 40, 1), picture(33, 90, 2, "JPEG")
QUESTION = {"type": "text", "text": "What is this?\n\n"}
ANSWER = {"role": "assistant", "content": "A cat"}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    write_processor(directory, request.param)
    return directory


@pytest.fixture
def vision(model: Path) -> ImageProcessor:
    return ImageProcessor(str(model))


@pytest.fixture(scope="module")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    """The family whose processor needs no torchvision."""
    directory = tmp_path_factory.mktemp("idefics3")
    write_processor(directory, "idefics3")
    return ImageProcessor(str(directory))


def processor_ids(vision: ImageProcessor, messages: list[dict[str, Any]], *, generation_prompt: bool) -> list[int]:
    """What the processor's own template and tokenizer make of a conversation whose pictures are bytes."""
    decoded = [{**message, "content": [_decoded(part) for part in message["content"]]} for message in messages]
    tokens = vision.processor.apply_chat_template(
        decoded, add_generation_prompt=generation_prompt, tokenize=True, return_dict=True, return_tensors="np"
    )
    return tokens["input_ids"][0].tolist()


def _decoded(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    return {"type": "image", "image": Image.open(io.BytesIO(part["image"])).convert("RGB")}


def shown(data: bytes) -> dict[str, Any]:
    return {"type": "image", "image": data}


def forms_of_the_row(folder: Path) -> list[dict[str, Any]]:
    """A question between two pictures, in the forms that people have it."""
    (folder / "first.png").write_bytes(FIRST)
    (folder / "second.jpg").write_bytes(SECOND)
    uri = f"data:image/jpeg;base64,{base64.b64encode(SECOND).decode()}"
    tags = f"<image>{QUESTION['text']}<image>"
    paths = ["first.png", "second.jpg"]
    image_parts = [{"type": "image"}, QUESTION, {"type": "image"}]
    own_parts = [
        {"type": "image", "path": "first.png"},
        QUESTION,
        {"type": "image_url", "image_url": {"url": uri}},
    ]
    return [
        {"messages": [{"role": "user", "content": tags}], "images": paths},
        {"messages": [{"role": "user", "content": image_parts}], "images": paths},
        {"messages": [{"role": "user", "content": own_parts}]},
        {"messages": [{"role": "user", "content": [*own_parts[:2], {"type": "image"}]}], "image": "second.jpg"},
        {"prompt": tags, "images": [{"path": "first.png"}, uri]},
        {"conversations": [{"from": "human", "value": tags}], "images": paths},
    ]


def test_every_form_of_a_prompt_has_the_processors_ids(vision: ImageProcessor, make_data: Callable[..., Any], tmp_path):
    content = [shown(FIRST), QUESTION, shown(SECOND)]
    wanted = processor_ids(vision, [{"role": "user", "content": content}], generation_prompt=True)
    for form in forms_of_the_row(tmp_path):
        data = make_data([form])
        (prompt,) = load_prompts(data.train, data, vision.processor.tokenizer, 0, vision=vision)
        assert prompt.token_ids.tolist() == wanted
        assert prompt.images == (FIRST, SECOND) and "images" not in prompt.columns
        assert prompt.messages[0]["content"] == f"<image>{QUESTION['text']}<image>"
        given = prompt.engine_token_ids
        assert given is not None and (given == vision.image_token_id).sum() == 2
        assert vision.expand(given, prompt.images).tolist() == wanted


def test_an_example_has_the_processors_ids_and_trains_its_answers_alone(vision: ImageProcessor, make_data: Any):
    text = "Which one?"
    row = {
        "messages": [
            {"role": "user", "content": [shown(FIRST), QUESTION]},
            ANSWER,
            {"role": "user", "content": f"<image>{text}"},
            {"role": "assistant", "content": "The dog"},
        ],
        "images": [SECOND],
    }
    parts = [
        {"role": "user", "content": [shown(FIRST), QUESTION]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
        {"role": "user", "content": [shown(SECOND), {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The dog"}]},
    ]
    as_bytes = {"messages": row["messages"], "images": row["images"]}
    tokenizer = vision.processor.tokenizer
    for loss_on in ("all_assistant", "all"):
        example = _one_example(make_data, as_bytes, tokenizer, vision, loss_on)
        wanted = processor_ids(vision, parts, generation_prompt=False)
        # The template's last line end is not trained, and the project leaves it in the text.
        assert example.token_ids.tolist() == wanted
        assert example.images == (FIRST, SECOND)
        trained = tokenizer.decode(example.token_ids[example.loss_mask])
        if loss_on == "all_assistant":
            assert "A cat" in trained and "The dog" in trained and "Which" not in trained
        else:
            assert "Which" in trained and vision.image_token not in trained


def _one_example(make_data: Any, row: dict[str, Any], tokenizer: Any, vision: ImageProcessor, loss_on: str) -> Any:
    data = make_data([_without_bytes(row)], loss_on=loss_on)
    (example,) = load_examples(data, tokenizer, 0, vision)
    return example


def _without_bytes(value: Any) -> Any:
    """The row as JSON can hold it: pictures in base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: _without_bytes(item) for key, item in value.items()}
    return [_without_bytes(item) for item in value] if isinstance(value, list) else value


def test_both_sides_of_a_pair_and_judged_answers_carry_the_pictures(vision: ImageProcessor, make_data: Any):
    tokenizer = vision.processor.tokenizer
    row = {"prompt": "Look: <image>", "images": [FIRST], "chosen": "A cat", "rejected": "A dog"}
    (pair,) = load_pairs(make_data([_without_bytes(row)]), tokenizer, 0, vision)
    asked = {"role": "user", "content": [{"type": "text", "text": "Look: "}, shown(FIRST)]}
    for side, said in ((pair.chosen, "A cat"), (pair.rejected, "A dog")):
        answer = {"role": "assistant", "content": [{"type": "text", "text": said}]}
        assert side.token_ids.tolist() == processor_ids(vision, [asked, answer], generation_prompt=False)
        assert side.images == (FIRST,) and said in tokenizer.decode(side.token_ids[side.loss_mask])
    rows = [{"prompt": "<image>", "response": said, "images": FIRST, "label": said == "yes"} for said in ("yes", "no")]
    for judged in load_labelled(make_data([_without_bytes(row) for row in rows]), tokenizer, 0, vision):
        assert judged.example.images == (FIRST,)


def read(vision: ImageProcessor | None, name: str = "prompt", **columns: Any) -> Record:
    return to_record(Row(1, columns), name, vision)


def test_pictures_without_a_place_stand_before_the_first_question(idefics: ImageProcessor):
    record = read(idefics, prompt="Which?", system="Look.", images=[FIRST, SECOND])
    assert [message["content"] for message in record.messages] == ["Look.", "<image><image>Which?"]
    assert record.images == (FIRST, SECOND)


def test_a_losing_answer_may_be_to_other_pictures(idefics: ImageProcessor):
    messages = [{"role": "user", "content": "<image>?"}, ANSWER]
    lost = {"rejected_response": "A dog", "rejected_images": [SECOND]}
    record = read(idefics, "preference", messages=messages, images=[FIRST], **lost)
    assert (record.images, record.rejected_images) == ((FIRST,), (SECOND,))
    record = read(idefics, "preference", messages=messages, images=[FIRST], rejected_response="A dog")
    assert record.rejected_images == (FIRST,)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "<image>"}, "its text has 1 <image>, and its column 0 pictures"),
        ({"prompt": "<image><image>", "images": [FIRST]}, "its text has 2 <image>s, and its column 1 picture"),
        ({"prompt": "<image>", "images": [FIRST, SECOND]}, "its text has 1 <image>, and its column 2 pictures"),
        ({"prompt": "a", "images": [FIRST, FIRST[:60]]}, r"`images\[1\]`: it is damaged"),
        ({"prompt": "a", "images": ["no.png"]}, r"`images\[0\]`: there is no file no\.png"),
        ({"prompt": "a", "images": "https://x.org/a.png"}, "`images`: https://x.org/a.png is an address"),
        ({"prompt": "a", "images": [FIRST], "image": FIRST}, "both `images` and `image` hold pictures"),
        ({"prompt": "a", "videos": ["a.mp4"]}, r"`videos\[0\]` is a video, and the model takes none: give the frames"),
    ],
)
def test_pictures_that_cannot_be_placed_are_named(idefics: ImageProcessor, columns: dict[str, Any], reason: str):
    with pytest.raises(RowError, match=reason):
        read(idefics, **columns)


def test_a_model_of_text_refuses_pictures_and_leaves_tags_as_they_are(idefics: ImageProcessor):
    with pytest.raises(RowError, match=r"`images\[0\]` is a picture, and the model takes text alone"):
        read(None, prompt="a", images=[FIRST])
    assert read(None, prompt="An <image> tag").messages[0]["content"] == "An <image> tag"
    with pytest.raises(RowError, match="plain text has no place for one"):
        read(idefics, "text", text="a", images=[FIRST])


def test_control_tokens_in_a_message_are_broken_up_and_the_tags_of_its_pictures_are_not(idefics: ImageProcessor):
    """Of Idefics3 the tag is such a token."""
    texts = ControlTexts(idefics.processor.tokenizer)
    message = {"role": "user", "content": "<image>a<end_of_utterance>b"}
    (shown,), number = texts.broken_up([{**message, "images": 1}])
    assert (shown["content"], number) == ("<image>a< end_of_utterance>b", 1)
    (told,), number = texts.broken_up([message])
    assert (told["content"], number) == ("< image>a< end_of_utterance>b", 2)


def test_a_placeholder_in_the_text_itself_is_refused(vision: ImageProcessor, make_data: Any):
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": vision.image_token}]}]
    with pytest.raises(
        DataError, match=r"it has 0 pictures, and the text that the chat template makes of it .* 1 time"
    ):
        load_examples(make_data(rows), vision.processor.tokenizer, 0, vision)


def test_a_template_that_shows_no_picture_as_the_model_reads_it_is_refused_once(vision: ImageProcessor, make_data: Any):
    """Gemma 3's writes what its processor writes the placeholders in the place of."""
    tokenizer = copy.deepcopy(vision.processor.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text or '<start>' }}{% endfor %}{% endfor %}"
    )
    rows = [{"prompt": "<image>Hi", "response": "Ho", "images": [base64.b64encode(FIRST).decode()]}] * 2
    with pytest.raises(DataError, match=r"the chat template writes no .* where a message shows a picture") as refused:
        load_examples(make_data(rows), tokenizer, 0, vision)
    assert "row 1" not in str(refused.value)


def test_a_vision_model_reads_rows_of_text_alone_without_its_processor(vision: ImageProcessor, make_data: Any):
    tokenizer = vision.processor.tokenizer
    untouched = ImageProcessor(vision._path)
    (example,) = load_examples(make_data([{"prompt": "Hi", "response": "Ho"}]), tokenizer, 0, untouched)
    assert example.images == () and "processor" not in vars(untouched)


def test_rows_are_not_cut_within_a_picture(idefics: ImageProcessor, make_data: Any):
    tokenizer = idefics.processor.tokenizer
    short = {"prompt": "Hi", "response": "Ho"}
    row = {"prompt": "Look: <image>", "response": "A cat " * 9, "images": base64.b64encode(FIRST).decode()}
    whole = load_examples(make_data([row]), tokenizer, 0, idefics)[0]
    last = max(i for i, token in enumerate(whole.token_ids) if token == idefics.image_token_id)
    for limit, kept in ((last + 20, 2), (last + 1, 1), (last, 1)):
        data = make_data([short, row], max_tokens=limit, overlong="truncate")
        examples = load_examples(data, tokenizer, 0, idefics)
        assert len(examples) == kept
        if kept == 2:
            assert examples[1].token_ids.tolist() == whole.token_ids[:limit].tolist()
    data = make_data([short, row], max_prompt_tokens=last, overlong="truncate")
    prompts = load_prompts(data.train, data, tokenizer, 0, vision=idefics)
    assert len(prompts) == 1 and "a prompt with pictures is not cut" in str(prompts.skipped[0])
    with pytest.raises(DataError, match="overlong row"):
        load_prompts(data.train, make_data([row], max_prompt_tokens=last), tokenizer, 0, vision=idefics)
