"""The torch engine's server, asked by the openai client, against transformers' generate."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlflow.actors.rollout_engines.scripted_engine import ScriptedEngine
from rlflow.data.errors import DataError
from rlflow.serving.models import ServedModel, Settings, open_streams, read_model
from rlflow.serving.streams import Streams
from tests.rlflow.serving.conftest import CONTEXT, Oracle, oracle_of, running, server_of, source_of

openai = pytest.importorskip("openai")

QUESTION = [{"role": "user", "content": "12+30="}]
LONGER = [{"role": "system", "content": "Add."}, *QUESTION, {"role": "assistant", "content": "42"}, *QUESTION]
SILENT = [*QUESTION, {"role": "assistant", "content": ""}, *QUESTION]
"""An answer that ended as it began, which is part of the conversation as any other."""


def client_of(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return client_of(url)


def ask(client: Any, messages: Any = QUESTION, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, "temperature": 0} | options)


def joined(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.mark.parametrize("messages", [QUESTION, LONGER, SILENT], ids=["question", "conversation", "silence"])
def test_a_greedy_answer_is_that_of_transformers(client: Any, oracle: Oracle, messages: Any) -> None:
    answer = ask(client, messages, max_tokens=20)
    ids = oracle.write(oracle.chat_ids(messages), 20)
    assert answer.choices[0].message.content == oracle.text(ids)
    assert answer.choices[0].finish_reason == ("stop" if ids[-1] == 1 else "length")
    assert answer.usage.prompt_tokens == len(oracle.chat_ids(messages))
    assert answer.usage.completion_tokens == len(ids)


def test_a_streamed_answer_is_the_same_and_comes_in_pieces(client: Any, oracle: Oracle) -> None:
    options = {"max_completion_tokens": 20, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, **options))
    assert joined(chunks) == oracle.answer(QUESTION, 20)
    assert len(chunks) > 10 and chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_of_texts_and_of_token_ids_are_those_of_transformers(client: Any, oracle: Oracle) -> None:
    texts = ["12+30=", "Hello, "]
    ids = [oracle.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    expected = [oracle.text(oracle.write(prompt, 12)) for prompt in ids for _ in range(2)]
    for prompts in (texts, ids):
        answer = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=12, n=2)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    streamed = client.completions.create(model="tiny", prompt=texts[1], temperature=0, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[2]


@pytest.mark.slow
def test_requests_at_the_same_time_get_what_they_get_alone(client: Any, oracle: Oracle) -> None:
    questions = [[{"role": "user", "content": f"{i}+{7 * i}="}] for i in range(20)]
    with ThreadPoolExecutor(20) as threads:
        asked = [threads.submit(lambda m=m: joined(ask(client, m, max_tokens=16, stream=True))) for m in questions]
        assert [one.result(60) for one in asked] == [oracle.answer(messages, 16) for messages in questions]


def test_a_seed_decides_an_answer_and_each_of_n_has_its_own(client: Any) -> None:
    def texts(seed: int) -> list[str]:
        answer = ask(client, temperature=1.0, top_p=0.95, seed=seed, n=3, max_tokens=24)
        return [choice.message.content for choice in answer.choices]

    assert texts(5) == texts(5) != texts(6)
    assert len(set(texts(5))) == 3


def test_logprobs_are_those_of_a_forward_pass(client: Any, oracle: Oracle) -> None:
    prompt = oracle.chat_ids(QUESTION)
    ids = oracle.write(prompt, 10)
    with torch.inference_mode():
        logits = oracle.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    content = ask(client, max_tokens=10, logprobs=True).choices[0].logprobs.content
    np.testing.assert_allclose([token.logprob for token in content], expected, atol=1e-4)
    assert "".join(token.token for token in content) == oracle.tokenizer.decode(ids)
    text = oracle.tokenizer.decode(prompt)
    answer = client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=10, logprobs=1, stream=True)
    found = [value for chunk in answer for value in chunk.choices[0].logprobs.token_logprobs]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_stop_string_ends_an_answer_before_it_and_its_request(client: Any, oracle: Oracle, streams: Streams) -> None:
    whole = oracle.answer(QUESTION, 24)
    stop = whole[9:11]
    for stream in (False, True):
        answer = ask(client, max_tokens=24, stop=[stop, "never this"], stream=stream)
        text = joined(answer) if stream else answer.choices[0].message.content
        assert text == whole[: whole.index(stop)]
    wait_until_idle(streams)


def test_models_are_listed(client: Any, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there are tiny"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"messages": [{"role": "user", "content": "1" * CONTEXT}]}, "reads 160"),
        ({"max_tokens": CONTEXT}, "max_tokens asks for 160 more"),
        ({"max_tokens": 0}, "max_tokens is not a whole number"),
        ({"temperature": -1}, "temperature is not a number"),
        ({"top_p": 0}, "top_p is not a number above 0 and up to 1"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty is not a number above 0 and up to 100"),
        ({"temperature": -1}, "temperature is not a number from 0 to 100"),
        ({"n": 1.5}, "n is not a whole number"),
        ({"messages": []}, "messages is not a list"),
        ({"messages": [{"role": "boss", "content": "?"}]}, "has the role 'boss'"),
        ({"messages": [{"role": "user", "content": "é"}]}, "the character 'é' is not in"),
        ({"stop": [""]}, "stop is not"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported by the torch engine"),
        ({"logprobs": True, "top_logprobs": 3}, "the logprob of the drawn token alone"),
        ({"extra_body": {"tempurature": 1}}, "tempurature is not known here"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools is not supported"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(client: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as raised:
        ask(client, **options)
    assert raised.value.type == "invalid_request_error"
    if "160" in said:
        assert raised.value.code == "context_length_exceeded"


def test_a_completion_without_room_names_the_prompt(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="reads 160") as raised:
        client.completions.create(model="tiny", prompt="1" * CONTEXT)
    assert raised.value.param == "prompt"


def test_what_is_no_http_is_a_bad_request_and_a_line_in_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nno header\r\n\r\n")
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.0 400")
    assert len(caplog.text.splitlines()) == 1 and "Error handling request" in caplog.text


def test_a_model_that_is_not_there_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist; there are tiny") as raised:
        ask(client, model="gpt-5")
    assert raised.value.code == "model_not_found"


def test_what_is_no_request_gets_an_error_object(url: str) -> None:
    import httpx

    post = f"{url}/v1/chat/completions"
    json = {"Content-Type": "application/json"}
    answers = [
        httpx.post(post, content="{", headers=json),
        httpx.post(post, content="[]", headers=json),
        httpx.post(post, content="[" * 100_000, headers=json),
        httpx.post(post, content=r'{"messages": [{"role": "user", "content": "\ud800"}]}', headers=json),
        httpx.post(post, content="{}", headers={"Content-Type": "text/plain"}),
        httpx.get(post),
        httpx.get(f"{url}/v1/nothing"),
        httpx.get(f"{url}/health", headers={"Host": "example.org"}),
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 400, 400, 415, 405, 404, 403]
    assert all(answer.json()["error"]["message"] for answer in answers)


def test_a_token_is_asked_for_where_there_is_one(served: ServedModel, streams: Streams) -> None:
    import httpx

    with running(server_of(served, streams, token="secret")) as url:
        for key in (b"none", b"secre", "ségret".encode(), b"s\xe9gret"):
            answer = httpx.get(f"{url}/v1/models", headers={"Authorization": b"Bearer " + key})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            ask(client_of(url))
        assert ask(client_of(url, "secret"), max_tokens=2).choices
        assert httpx.get(f"{url}/health").status_code == 200


def wait_until_idle(streams: Streams) -> None:
    deadline = time.monotonic() + 20
    while streams.num_under_way:
        assert time.monotonic() < deadline, "requests are still under way"
        time.sleep(0.01)


@pytest.fixture
def endless(served: ServedModel) -> Iterator[Streams]:
    engine = ScriptedEngine(8, length=lambda request: 10**6, token=30, step_s=0.002)
    engine.load_weights([], 0)
    streams = Streams({"tiny": engine})
    yield streams
    streams.close()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_requests(served: ServedModel, endless: Streams, stream: bool) -> None:
    with running(server_of(served, endless)) as url:
        if stream:
            answer = ask(client_of(url), stream=True, n=3)
            assert next(iter(answer)) and endless.num_under_way == 3
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(client_of(url).with_options(timeout=0.3), n=3)
        wait_until_idle(endless)


def test_an_engine_that_fails_is_said_to_everybody(served: ServedModel) -> None:
    class Failing(ScriptedEngine):
        def step(self) -> Any:
            raise MemoryError("no room")

    engine = Failing(8)
    engine.load_weights([], 0)
    streams = Streams({"tiny": engine})
    with running(server_of(served, streams)) as url:
        for expected in (500, 503):
            with pytest.raises(openai.InternalServerError, match=r"MemoryError: no room|engine has failed") as raised:
                ask(client_of(url))
            assert raised.value.status_code == expected
    streams.close()


def test_an_adapter_as_the_model_answers_beside_its_base(
    policy_dir: Path, adapter_dirs: dict[str, Path], settings: Settings, oracle: Oracle
) -> None:
    model = read_model(source_of(adapter_dirs["left"], "trained"), settings)
    streams = open_streams(model, "torch", {}, settings)
    with running(server_of(model, streams)) as url:
        client = client_of(url)
        assert [one.id for one in client.models.list()] == ["policy", "trained"]
        said = [ask(client, model=name, max_tokens=16).choices[0].message.content for name in ("trained", "policy")]
    streams.close()
    assert said == [oracle_of(policy_dir, adapter_dirs["left"]).answer(QUESTION, 16), oracle.answer(QUESTION, 16)]


def test_an_adapter_of_a_model_of_another_shape_is_refused(
    policy_dir: Path, adapter_dirs: dict[str, Path], settings: Settings, tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(adapter_dirs["left"], tmp_path / "wrong"))
    weights = load_file(wrong / "adapter_model.safetensors")
    missing = next(name for name in weights if "lora_B" in name)
    save_file(
        {name: tensor for name, tensor in weights.items() if name != missing}, wrong / "adapter_model.safetensors"
    )
    with pytest.raises(DataError, match=r"wrong is no adapter of this model: .*lora_B.* is not in both"):
        open_streams(read_model(source_of(policy_dir), settings), "torch", {"wrong": wrong}, settings)
    save_file({**weights, missing: weights[missing][:-1].contiguous()}, wrong / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"wrong is no adapter of this model: .*lora_B.*shape"):
        open_streams(read_model(source_of(policy_dir), settings), "torch", {"wrong": wrong}, settings)


def test_adapters_answer_under_their_names_beside_their_base(
    policy_dir: Path, adapter_dirs: dict[str, Path], settings: Settings, oracle: Oracle
) -> None:
    model = read_model(source_of(policy_dir), settings)
    streams = open_streams(model, "torch", adapter_dirs, settings)
    expected = {"tiny": oracle.answer(QUESTION, 16)}
    expected |= {name: oracle_of(policy_dir, path).answer(QUESTION, 16) for name, path in adapter_dirs.items()}
    assert len(set(expected.values())) == 3
    with running(server_of(model, streams, adapter_dirs)) as url, ThreadPoolExecutor(9) as threads:
        client = client_of(url)
        names = [*expected] * 3
        asked = [threads.submit(lambda n=n: joined(ask(client, model=n, max_tokens=16, stream=True))) for n in names]
        assert [one.result(60) for one in asked] == [expected[name] for name in names]
    streams.close()
