"""What clients of OpenAI's API ask for, checked: https://platform.openai.com/docs/api-reference.

Beside its fields: vLLM's ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids`` and ``ignore_eos``, and of
completions ``prompt_logprobs`` and ``return_token_ids``. A field that would change the answer and is not known here is
refused; those that say nothing about the answer are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.data.errors import RowError
from rlflow.data.image_rows import place_images
from rlflow.data.messages import MEDIA_TAGS, TAGS, GivenImage, to_messages
from rlflow.serving.conversation import AskedPrompt, TooLongError, encode_text, render, room_behind
from rlflow.serving.models import ServedModel
from rlflow.serving.sampling import Sampling
from rlflow.types import Message, SamplingParams

WITHOUT_MEANING = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}
"""Fields that say nothing about the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}
"""Fields that this server does not have, and the values that ask for nothing."""
KNOWN = {
    *("model", "messages", "prompt", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "seed"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "stop_token_ids", "ignore_eos"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids"),
}
MOST_ANSWERS = 128
"""Of one request."""
MOST_STOPS = 16
MOST_PROMPT_LOGPROBS = 256
"""Most probable tokens of each place of a prompt."""


class RequestError(ValueError):
    """A request that is not answered: OpenAI's error object, and the HTTP status it comes with."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request, ready for the engine."""

    model: str
    prompts: list[AskedPrompt]
    params: list[SamplingParams]
    """Of each prompt: how long an answer may be depends on it."""
    stop: tuple[str, ...]
    n: int
    """Answers to each prompt."""
    seed: int | None
    stream: bool
    include_usage: bool
    logprobs: bool
    prompt_logprobs: int | None = None
    """So many of the most probable tokens in the place of each of a prompt's; None: nothing is said of the prompt."""
    returns_token_ids: bool = False


def parse(body: Any, models: Mapping[str, ServedModel], *, is_chat: bool) -> Wanted:
    """
    Args:
        models: By their names; one stands for all adapters of a base.

    Raises:
        RequestError: It is no such request, or one that cannot be answered here.
    """
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    _refuse_unknown(given)
    _refuse_of_whole_completions(given, is_chat=is_chat)
    name = _field(given, "model", str, "the name of a model")
    model = model_of(name, models)
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop) or len(stop) > MOST_STOPS:
        raise RequestError(f"stop is not a text, or a list of at most {MOST_STOPS} texts", param="stop")
    sampling = model.defaults.given(
        temperature=_number(given, "temperature", 0, 100),
        top_p=_number(given, "top_p", 0, 1, exclusive=True),
        top_k=_top_k(given),
        min_p=_number(given, "min_p", 0, 1),
        repetition_penalty=_number(given, "repetition_penalty", 0, 100, exclusive=True),
        stop=tuple(stop) or None,
    )
    prompts = _messages(given, model) if is_chat else _prompts(given, model)
    options = given.get("stream_options", {})
    return Wanted(
        model=name,
        prompts=prompts,
        params=[_params(given, model, sampling, prompt, is_chat=is_chat) for prompt in prompts],
        stop=sampling.stop,
        n=_integer(given, "n", 1, MOST_ANSWERS) or 1,
        seed=_integer(given, "seed", -(2**63), 2**64 - 1),
        stream=bool(_flag(given, "stream")),
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        logprobs=_wants_logprobs(given, sampling, is_chat=is_chat),
        prompt_logprobs=_integer(given, "prompt_logprobs", 0, min(MOST_PROMPT_LOGPROBS, model.vocabulary)),
        returns_token_ids=bool(_flag(given, "return_token_ids")),
    )


def tokenized(body: Any, models: Mapping[str, ServedModel]) -> dict[str, Any]:
    """What vLLM's /tokenize says of a text.

    Raises:
        RequestError: It is no such request, or of a model that is not here.
    """
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object")
    model = model_of(_field(body, "model", str, "the name of a model"), models)
    text = _field(body, "prompt", str, "a text")
    special = body.get("add_special_tokens", True)
    if not isinstance(special, bool):
        raise RequestError("add_special_tokens is not true or false", param="add_special_tokens")
    ids = model.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return {"count": len(ids), "max_model_len": model.context, "tokens": ids}


def model_of(name: str, models: Mapping[str, ServedModel]) -> ServedModel:
    """
    Raises:
        RequestError: None bears that name.
    """
    if name not in models:
        raise RequestError(
            f"the model {name!r} does not exist; there are {', '.join(models)}",
            param="model",
            code="model_not_found",
            status=404,
        )
    return models[name]


def _params(
    given: Mapping[str, Any], model: ServedModel, sampling: Sampling, prompt: AskedPrompt, *, is_chat: bool
) -> SamplingParams:
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    longest = _integer(given, name, 1, 2**31)
    try:
        room = room_behind(prompt.token_ids, model)
    except TooLongError as error:
        raise RequestError(
            str(error), param="messages" if is_chat else "prompt", code="context_length_exceeded"
        ) from error
    if longest is not None and longest > room:
        raise RequestError(
            f"the model reads {model.context:,} tokens: the prompt has {len(prompt.token_ids):,}, and {name} asks for "
            f"{longest:,} more",
            param=name,
            code="context_length_exceeded",
        )
    stops = given.get("stop_token_ids", [])
    if not isinstance(stops, list) or not all(type(one) is int for one in stops):
        raise RequestError("stop_token_ids is not a list of numbers", param="stop_token_ids")
    own = () if _flag(given, "ignore_eos") else model.stop_token_ids
    return sampling.given(max_new_tokens=longest).params(tuple(sorted({*own, *stops})), room)


def _messages(given: Mapping[str, Any], model: ServedModel) -> list[AskedPrompt]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages", param="messages")
    if not model.has_template:
        raise RequestError(f"{given['model']} has no chat template: ask /v1/completions", param="messages")
    # What OpenAI calls a system message now.
    renamed = [{**m, "role": "system"} if isinstance(m, dict) and m.get("role") == "developer" else m for m in messages]
    try:
        said = [_with_own_images(message) for message in to_messages(renamed, "messages", may_be_empty=True)]
        messages, images = place_images(said, (), model.vision, Path.cwd())
        return [render(model, messages, images)]
    except RowError as error:
        raise RequestError(str(error), param="messages") from error


def _with_own_images(message: Message) -> Message:
    """A message whose pictures are those of its parts: tags such as ``<image>`` are what somebody wrote.

    Raises:
        RowError: A picture is not in the request itself.
    """
    parts = message.get("images")
    if parts is None:
        return {**message, "images": []} if MEDIA_TAGS.search(message["content"]) else message
    tags = MEDIA_TAGS.findall(message["content"])
    # Beside a picture <video> is what somebody wrote, as no video comes here.
    own = [
        None if part is None and tag != TAGS["image"] else _own_image(part)
        for part, tag in zip(parts, tags, strict=True)
    ]
    return {**message, "images": own}


def _own_image(part: GivenImage | None) -> GivenImage:
    """A picture as a mapping, which nobody keeps."""
    if part is not None and part.kind == "video":
        raise RowError(f"`{part.place}`: this server decodes no videos: send the frames that matter as pictures")
    if part is not None and part.kind == "audio":
        raise RowError(f"`{part.place}`: no engine here writes from recordings: send what is said as text")
    url = part.value.get("url") if part is not None and isinstance(part.value, dict) else part and part.value
    if part is None or not isinstance(url, str) or url[:5].lower() != "data:":
        where = "a picture's part" if part is None else f"`{part.place}`"
        raise RowError(
            f"{where}: send the picture itself, data:image/png;base64,...: this server reads no files of its machine "
            "and fetches nothing"
        )
    return GivenImage(part.place, {"url": url})


def _prompts(given: Mapping[str, Any], model: ServedModel) -> list[AskedPrompt]:
    """A text, a list of texts, token ids, or a list of lists of them."""
    prompt = given.get("prompt")
    if isinstance(prompt, str):
        return [encode_text(model, prompt)]
    rows: list[Any] = prompt if isinstance(prompt, list) else []
    if rows and type(rows[0]) is int:
        rows = [rows]
    if 0 < len(rows) <= MOST_ANSWERS:
        if all(isinstance(row, str) for row in rows):
            return [encode_text(model, row) for row in rows]
        if all(isinstance(row, list) and row and all(_is_id(one, model) for one in row) for row in rows):
            return [AskedPrompt(np.array(row, dtype=np.int32)) for row in rows]
    raise RequestError(
        f"prompt is not a text, token ids below {model.vocabulary}, or a list of at most {MOST_ANSWERS} of either",
        param="prompt",
    )


def _is_id(value: Any, model: ServedModel) -> bool:
    return type(value) is int and 0 <= value < model.vocabulary


def _wants_logprobs(given: Mapping[str, Any], sampling: Sampling, *, is_chat: bool) -> bool:
    """Only the token that was drawn has a logprob here: of a greedy answer that is the most probable one, too."""
    most = _integer(given, "top_logprobs" if is_chat else "logprobs", 0, 20) or 0
    if most > (0 if is_chat or sampling.temperature else 1):
        raise RequestError(
            "the torch engine has the logprob of the drawn token alone: ask for no others, or serve with --engine vllm",
            param="top_logprobs" if is_chat else "logprobs",
        )
    return bool(_flag(given, "logprobs")) if is_chat else "logprobs" in given


def _refuse_of_whole_completions(given: Mapping[str, Any], *, is_chat: bool) -> None:
    for name in ("prompt_logprobs", "return_token_ids"):
        if given.get(name, False) is not False and (is_chat or _flag(given, "stream")):
            raise RequestError(f"{name} is of /v1/completions without stream: ask there, or leave it out", param=name)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in KNOWN or name in WITHOUT_MEANING or value in NEUTRAL.get(name, ()):
            continue
        what = "is not supported by the torch engine" if name in NEUTRAL else "is not known here"
        raise RequestError(f"{name} {what}: leave it out, or serve with --engine vllm", param=name)


def _top_k(given: Mapping[str, Any]) -> int | None:
    """vLLM's -1 means all tokens, as 0 does."""
    value = _integer(given, "top_k", -1, 2**31)
    return None if value is None else max(0, value)


def _number(given: Mapping[str, Any], name: str, least: float, most: float, *, exclusive: bool = False) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not least <= value <= most or (exclusive and value == least):
        span = f"above {least} and up to {most}" if exclusive else f"from {least} to {most}"
        raise RequestError(f"{name} is not a number {span}", param=name)
    return float(value)


def _integer(given: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} is not a whole number from {least} to {most}", param=name)
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool | None:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} is not true or false", param=name)
    return value


def _field(given: Mapping[str, Any], name: str, kind: type[Any], meaning: str) -> Any:
    if not isinstance(given.get(name), kind):
        raise RequestError(f"{name} is not {meaning}", param=name)
    return given[name]
