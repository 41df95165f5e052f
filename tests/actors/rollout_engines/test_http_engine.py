"""An engine over HTTP: exact logprobs and versions before, across and after an update, and a server that misbehaves.

The server is a stand-in over the torch engine; what transformers computes is the oracle, as for every engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlflow.actors.rollout_engines import http_calls
from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.http_calls import ServerError
from rlflow.actors.rollout_engines.http_engine import HttpEngine
from rlflow.actors.rollout_engines.stop_strings import StopStrings
from rlflow.types import SampleRequest, SamplingParams
from tests.actors.rollout_engines.engine_oracle import (
    EOS,
    VOCABULARY,
    assert_ended_by_strings,
    assert_logprobs_match,
    assert_same_tokens,
    finish,
    make_requests,
    random_policy,
    sent,
    sync,
    tokenizer_of_pieces,
    write_config,
)
from tests.actors.rollout_engines.http_stand_in import StandIn, send, serving

PARAMS = SamplingParams(max_new_tokens=24)


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return random_policy("tied", seed=0)


@pytest.fixture(scope="module")
def model_dir(policy: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_config(policy, directory)
    return directory


@pytest.fixture
def served(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StandIn, str]]:
    monkeypatch.setattr(http_calls, "FIRST_PAUSE_S", 0.001)
    with serving(model_dir) as stand_in_and_url:
        yield stand_in_and_url


def start(url: str, model_dir: Path, directory: Path, **changes: Any) -> HttpEngine:
    settings: dict[str, Any] = {"api": "vllm", "timeout_s": 30.0, "max_model_len": 128, "max_num_seqs": 8}
    return HttpEngine(str(model_dir), url=url, directory=directory, trust_remote_code=False, **(settings | changes))


def forget(engine: HttpEngine) -> None:
    """What has failed is not stopped once more when the engine is closed."""
    engine._under_way.clear()


@pytest.fixture(params=["vllm", "sglang"])
def engine(
    request: pytest.FixtureRequest, served: tuple[StandIn, str], model_dir: Path, policy: Any, tmp_path: Path
) -> Iterator[HttpEngine]:
    """With the policy's weights, as version 0."""
    engine = start(served[1], model_dir, tmp_path, api=request.param)
    sync(engine, policy)
    yield engine
    engine.close()


@pytest.fixture
def stand_in(served: tuple[StandIn, str]) -> StandIn:
    return served[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=24, temperature=0.7, top_k=10),
        SamplingParams(max_new_tokens=24, temperature=0.0),
        SamplingParams(max_new_tokens=24, stop_token_ids=(20,)),
        SamplingParams(max_new_tokens=24, temperature=1.5, min_p=0.05, repetition_penalty=1.3),
    ],
    ids=["temperature-and-top-k", "greedy", "stop", "min-p-and-penalty"],
)
def test_logprobs_equal_a_transformers_forward_and_only_the_given_stop_tokens_end_a_completion(
    engine: HttpEngine, policy: PreTrainedModel, stand_in: StandIn, params: SamplingParams
) -> None:
    stand_in.own_stops = (EOS,)
    requests = make_requests(params)
    completions = generate(engine, requests)
    assert_logprobs_match({0: policy}, requests, completions)
    for completion in completions:
        is_stop = np.isin(completion.token_ids, params.stop_token_ids)
        assert not is_stop[:-1].any()
        assert completion.finish_reason == ("stop" if is_stop[-1] else "length")
        assert is_stop[-1] or len(completion.token_ids) == 24
        assert completion.versions.tolist() == [0] * len(completion.token_ids)
    assert any(EOS in completion.token_ids[:-1] for completion in completions) or not params.temperature


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(engine: HttpEngine) -> None:
    """The stand-in answers with more than that, all at once."""
    stop = ("aa", "bcd", "hgfe")
    undisturbed = generate(engine, make_requests(PARAMS))
    stopping = StopStrings(engine, tokenizer_of_pieces())
    completions = generate(stopping, make_requests(replace(PARAMS, stop=stop)))
    assert_ended_by_strings(completions, undisturbed, stop)


@pytest.mark.slow
def test_completions_under_way_go_on_with_the_new_weights_and_say_which_version_sampled_each_token(
    engine: HttpEngine, policy: PreTrainedModel, stand_in: StandIn
) -> None:
    """The server is stopped after seven tokens of the eight that it may have at a time."""
    policies = {0: policy} | {version: random_policy("tied", seed=version) for version in (3, 7)}
    requests = make_requests(PARAMS)
    stand_in.num_steps = 0
    engine.add(requests)
    read_again = []
    for version, num_steps in ((3, 7), (7, 5)):
        stand_in.wait_until(lambda: stand_in.num_here == 8)
        stand_in.num_steps = num_steps
        stand_in.wait_until(lambda: stand_in.num_steps == 0)
        assert (engine.step(), engine.num_running, engine.num_waiting) == ([], 8, 8)
        read_again.append(sync(engine, policies[version], version))
    stand_in.num_steps = float("inf")
    finished = finish(engine)
    completions = [finished[request.id] for request in requests]
    versions = [completion.versions.tolist() for completion in completions]
    assert versions == [[0] * 7 + [3] * 5 + [7] * 12] * 8 + [[7] * 24] * 8
    assert_logprobs_match(policies, requests, completions)
    bodies = [body for path, body in stand_in.bodies if path in ("/v1/completions", "/generate")]
    seeds = [body["seed"] if "seed" in body else body["sampling_params"]["sampling_seed"] for body in bodies]
    assert len(set(seeds)) == len(seeds) == 8 + 8 + 16, "none draws the numbers again that it drew before"
    prompts = sum(len(request.token_ids) for request in requests[:8])
    assert read_again == [prompts + 8 * 7, prompts + 8 * 12]


def test_what_finished_while_weights_were_on_their_way_is_of_the_old_ones_and_not_lost(
    engine: HttpEngine, policy: PreTrainedModel, stand_in: StandIn
) -> None:
    requests = make_requests(PARAMS, group_size=1)
    engine.add(requests)
    stand_in.wait_until(lambda: all(one.answer.done() for one in engine._under_way.values()))
    newer = random_policy("tied", seed=1)
    sync(engine, newer, 1)
    engine.add(make_requests(PARAMS, group_size=1, first_id=10))
    finished = finish(engine)
    completions = [finished[id] for id in (0, 1, 2, 3, 10, 11, 12, 13)]
    assert [set(completion.versions.tolist()) for completion in completions] == [{0}] * 4 + [{1}] * 4
    both = [*requests, *make_requests(PARAMS, group_size=1, first_id=10)]
    assert_logprobs_match({0: policy, 1: newer}, both, completions)


def test_what_was_written_of_an_aborted_request_comes_back_and_the_others_go_on(
    engine: HttpEngine, stand_in: StandIn
) -> None:
    requests = make_requests(PARAMS)
    undisturbed = generate(engine, requests)
    stand_in.num_steps = 0
    engine.add(requests)
    stand_in.wait_until(lambda: stand_in.num_here == 8)
    stand_in.num_steps = 6
    stand_in.wait_until(lambda: stand_in.num_steps == 0)
    aborted = engine.abort([15, 99, 3, 0])
    assert [(completion.id, completion.finish_reason) for completion in aborted] == [
        (15, "abort"),
        (3, "abort"),
        (0, "abort"),
    ]
    for completion, length in zip(aborted, (0, 6, 6), strict=True):
        np.testing.assert_array_equal(completion.token_ids, undisturbed[completion.id].token_ids[:length])
        assert completion.logprobs.shape == completion.versions.shape == (length,)
    stand_in.num_steps = float("inf")
    finished = finish(engine)
    assert finished.keys() == set(range(16)) - {0, 3, 15}
    assert_same_tokens([finished[id] for id in sorted(finished)], [undisturbed[id] for id in sorted(finished)])


def test_a_request_that_is_stopped_before_its_first_token_has_none(
    engine: HttpEngine, policy: PreTrainedModel, stand_in: StandIn
) -> None:
    stand_in.num_steps = 0
    engine.add(make_requests(PARAMS, 2, 1))
    stand_in.wait_until(lambda: stand_in.num_here == 2)
    (aborted,) = engine.abort([0])
    assert (aborted.token_ids.tolist(), aborted.finish_reason) == ([], "abort")
    assert sync(engine, policy, 1) == 0
    stand_in.num_steps = float("inf")
    assert [c.versions.tolist() for c in finish(engine).values()] == [[1] * 24]


@pytest.mark.slow
def test_requests_that_are_added_while_others_run_get_the_tokens_that_they_get_alone(engine: HttpEngine) -> None:
    requests = make_requests(PARAMS)
    together = generate(engine, requests)
    assert_same_tokens(generate(engine, requests[::-1])[::-1], together)
    finished = {}
    for start_at in range(0, 16, 4):
        engine.add(requests[start_at : start_at + 4])
        finished |= {completion.id: completion for completion in engine.step()}
    finished |= finish(engine)
    assert_same_tokens([finished[request.id] for request in requests], together)


def test_ids_that_are_left_out_are_never_drawn(engine: HttpEngine, policy: PreTrainedModel) -> None:
    requests, left_out = make_requests(PARAMS), np.array([7, *range(24, VOCABULARY)])
    engine.leave_out(left_out)
    completions = generate(engine, requests)
    assert not np.isin(np.concatenate([completion.token_ids for completion in completions]), left_out).any()
    assert_logprobs_match({0: policy}, requests, completions, left_out=left_out.tolist())
    engine.leave_out(np.array([], dtype=np.int64))
    assert np.isin(np.concatenate([c.token_ids for c in generate(engine, requests)]), left_out).any()


def test_a_server_that_fails_for_a_while_is_asked_again(engine: HttpEngine, stand_in: StandIn) -> None:
    requests = make_requests(PARAMS, group_size=1)
    undisturbed = generate(engine, requests)
    stand_in.faults = [
        lambda handler: send(handler, 503, "loading"),
        lambda handler: handler.connection.close(),
        lambda handler: send(handler, 429, "busy"),
        lambda handler: send(handler, 500, "fault"),
    ]
    assert_same_tokens(generate(engine, requests), undisturbed)
    assert stand_in.faults == []


def test_a_refusal_is_said_with_the_servers_words_and_not_repeated(engine: HttpEngine, stand_in: StandIn) -> None:
    stand_in.faults = [lambda handler: send(handler, 400, '{"message": "this model has 64 tokens"}')]
    engine.add(make_requests(PARAMS, 1, 1))
    before = len(stand_in.bodies)
    with pytest.raises(ServerError, match=r"POST http://127.*(completions|generate): it answered 400.*has 64 tokens"):
        finish(engine)
    assert len(stand_in.bodies) <= before + 1
    forget(engine)


def test_an_answer_that_is_no_json_is_shown(engine: HttpEngine, stand_in: StandIn) -> None:
    stand_in.faults = [lambda handler: send(handler, 200, "<html>gateway")]
    engine.add(make_requests(PARAMS, 1, 1))
    with pytest.raises(ServerError, match="no JSON: <html>gateway"):
        finish(engine)
    forget(engine)


def test_a_server_that_stays_away_ends_in_an_error_with_its_url_and_the_number_of_attempts(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_calls, "FIRST_PAUSE_S", 0.001)
    with serving(model_dir) as (_, url):
        pass
    with pytest.raises(ServerError, match=rf"GET {url}/v1/models: 6 attempts failed.*refused.*rollout_server\.urls"):
        start(url, model_dir, tmp_path)


@pytest.mark.slow
def test_an_answer_that_does_not_come_ends_in_an_error_that_names_the_key(
    served: tuple[StandIn, str], model_dir: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    stand_in, url = served
    engine = start(url, model_dir, tmp_path, timeout_s=2.0)
    sync(engine, policy)
    stand_in.num_steps = 0
    engine.add(make_requests(PARAMS, 1, 1))
    with pytest.raises(ServerError, match=r"/v1/completions: no answer within 2 s: raise rollout_server\.timeout_s"):
        finish(engine)
    forget(engine)
    engine.close()


def test_a_vllm_without_its_control_calls_is_told_how_it_must_be_started(
    served: tuple[StandIn, str], model_dir: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    served[0].has_control = False
    engine = start(served[1], model_dir, tmp_path)
    with pytest.raises(ServerError, match=r"collective_rpc.*404.*VLLM_SERVER_DEV_MODE=1"):
        sync(engine, policy)


def test_weights_that_sglang_did_not_load_and_weights_of_another_run_are_errors(
    served: tuple[StandIn, str], model_dir: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    stand_in, url = served
    engine = start(url, model_dir, tmp_path, api="sglang")
    stand_in.faults = [lambda handler: send(handler, 200, '{"success": false, "message": "out of memory"}')]
    with pytest.raises(ServerError, match=r"update_weights_from_disk: it did not load.*out of memory"):
        sync(engine, policy)
    sync(engine, policy, 4)
    stand_in.label = "5"
    engine.add(make_requests(PARAMS, 1, 1))
    with pytest.raises(ServerError, match="written with weights 5, not the 4 that were loaded"):
        finish(engine)
    forget(engine)
    engine.close()


def test_logprobs_of_another_temperature_than_tokens_are_drawn_at_are_refused(
    served: tuple[StandIn, str], model_dir: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    stand_in, url = served
    stand_in.heats_logprobs = False
    engine = start(url, model_dir, tmp_path)
    sync(engine, policy)
    generate(engine, make_requests(PARAMS, 1, 1))
    with pytest.raises(ServerError, match=r"logprobs of temperature 1.*--logprobs-mode processed_logprobs"):
        engine.add(make_requests(SamplingParams(max_new_tokens=4, temperature=0.5), 1, 1))
    assert engine.num_running + engine.num_waiting == 0
    stand_in.heats_logprobs = True
    engine.add(make_requests(SamplingParams(max_new_tokens=4, temperature=0.5), 1, 1))
    assert len(finish(engine)) == 1
    engine.close()


def test_weights_and_requests_that_cannot_be_are_refused_before_the_server_hears_of_them(
    engine: HttpEngine, policy: PreTrainedModel, stand_in: StandIn
) -> None:
    before = len(stand_in.bodies)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*\(7,\).*\(64,\)"):
        engine.load_weights((sent(policy) | {"model.norm.weight": torch.zeros(7)}).items(), 1)
    with pytest.raises(ValueError, match="cannot be kept with its cache over HTTP"):
        sync(engine, policy, 1, "keep")
    long = SampleRequest(1, np.arange(2, 62, dtype=np.int32), 0, SamplingParams(max_new_tokens=69))
    with pytest.raises(ValueError, match=r"request 1: 60 prompt tokens and 69 new ones.*128"):
        engine.add([*make_requests(PARAMS, 1, 1), long])
    with pytest.raises(ValueError, match="rollout_server: a prompt has pictures, and servers are sent tokens alone"):
        engine.add([replace(make_requests(PARAMS, 1, 1)[0], images=(b"",))])
    with pytest.raises(ValueError, match="an id that is under way"):
        engine.add([*make_requests(PARAMS, 1, 1), *make_requests(PARAMS, 1, 1)])
    assert engine.num_running + engine.num_waiting == 0
    assert len(stand_in.bodies) == before


def test_the_servers_key_travels_in_a_header_and_a_proxy_of_the_environment_is_not_asked(
    served: tuple[StandIn, str], model_dir: Path, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv(http_calls.KEY_VARIABLE, "a-secret")
    seen = []
    served[0].faults = [lambda handler: (seen.append(handler.headers["Authorization"]), send(handler, 400, "no"))]
    with pytest.raises(ServerError) as caught:
        start(served[1], model_dir, tmp_path)
    assert seen == ["Bearer a-secret"]
    assert "a-secret" not in str(caught.value)
