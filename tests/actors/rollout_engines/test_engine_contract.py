"""What every rollout engine promises, held against transformers: the same tests for each engine of conftest.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.rollout_engines.sent_weights import Chunks
from rlflow.actors.rollout_engines.stop_strings import StopStrings
from rlflow.types import Completion, SampleRequest, SamplingParams
from tests.actors.rollout_engines.engine_oracle import (
    EOS,
    TOLERANCE,
    VOCABULARY,
    assert_ended_by_strings,
    assert_logprobs_match,
    assert_same_tokens,
    finish,
    kind_of,
    make_requests,
    random_policy,
    sent,
    sync,
    tokenizer_of_pieces,
)

if TYPE_CHECKING:
    from rlflow.actors.rollout_engines.engine import CacheAtUpdate, RolloutEngine


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=24, temperature=0.7, top_k=10),
        SamplingParams(max_new_tokens=24, temperature=0.0),
        SamplingParams(max_new_tokens=24, temperature=0.7, min_p=0.2),
        SamplingParams(max_new_tokens=24, temperature=0.7, repetition_penalty=1.3),
        SamplingParams(max_new_tokens=24, temperature=1.5, min_p=0.05, top_k=10, repetition_penalty=0.8),
        SamplingParams(max_new_tokens=24, temperature=0.0, min_p=0.2, repetition_penalty=1.3),
    ],
    ids=["plain", "temperature-and-top-k", "greedy", "min-p", "penalty", "all", "greedy-with-penalty"],
)
def test_logprobs_equal_a_transformers_forward(
    engine: RolloutEngine, policy: PreTrainedModel, params: SamplingParams
) -> None:
    requests = make_requests(params)
    completions = generate(engine, requests)
    assert_logprobs_match({0: policy}, requests, completions)
    assert all((completion.versions == 0).all() for completion in completions)


def test_logprobs_follow_each_of_two_weight_syncs_in_a_row(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=24, temperature=0.7, top_k=10))
    generate(engine, requests)
    for version in (1, 2):
        newer = random_policy(kind_of(policy), seed=version)
        assert sync(engine, newer, version) == 0
        completions = generate(engine, requests)
        assert_logprobs_match({version: newer}, requests, completions)
        assert all((completion.versions == version).all() for completion in completions)


def test_weights_that_come_in_pieces_whose_memory_is_used_again_are_those_that_come_at_once(
    engine: RolloutEngine, policy: PreTrainedModel
) -> None:
    if type(engine).__name__ == "HttpEngine":
        pytest.skip("servers read files")
    newer = random_policy(kind_of(policy), seed=1)

    def pieces() -> Iterator[list[tuple[str, torch.Tensor]]]:
        whole = [(name, tensor.detach().clone()) for name, tensor in sent(newer).items()]
        for first in range(0, len(whole), 3):
            yield whole[first : first + 3]
            for _, tensor in whole[first : first + 3]:
                tensor.fill_(torch.nan)

    engine.load_weights(Chunks(pieces()), 1)
    requests = make_requests(SamplingParams(max_new_tokens=24, temperature=0.7))
    assert_logprobs_match({1: newer}, requests, generate(engine, requests))


@pytest.mark.parametrize("cache", ["recompute", "keep"])
def test_completions_under_way_go_on_with_the_new_weights_and_say_which_version_sampled_each_token(
    engine: RolloutEngine, policy: PreTrainedModel, cache: CacheAtUpdate
) -> None:
    """At the first update six are running, with room for two of the six that wait; all have prompts in common."""
    policies = {0: policy} | {version: random_policy(kind_of(policy), seed=version) for version in (3, 7)}
    requests = make_requests(SamplingParams(max_new_tokens=24, temperature=0.9))
    requests = [requests[4 * prompt + sample] for sample in range(4) for prompt in (3, 2, 1, 0)]
    engine.add(requests[:12])
    assert [engine.step() for _ in range(7)] == [[]] * 7
    assert (engine.num_running, engine.num_waiting) == (8, 4)
    engine.abort([request.id for request in requests[6:8]])
    read_again = sync(engine, policies[3], 3, cache)
    engine.add(requests[12:])
    assert [engine.step() for _ in range(5)] == [[]] * 5
    sync(engine, policies[7], 7, cache)
    finished = finish(engine)
    del requests[6:8]
    completions = [finished.pop(request.id) for request in requests]
    assert not finished
    versions = [completion.versions.tolist() for completion in completions]
    assert versions[:6] == [[0] * 7 + [3] * 5 + [7] * 12] * 6
    assert versions[6:8] == [[3] * 5 + [7] * 19] * 2
    assert versions[8:] == [[7] * 24] * 6
    assert_logprobs_match(policies, requests, completions, cache)
    written = sum(len(request.token_ids) + 7 for request in requests[:6])
    assert 0 < read_again <= written if cache == "recompute" else read_again == 0


@pytest.mark.parametrize("cache", ["recompute", "keep"])
def test_updates_with_the_same_weights_change_no_token(
    engine: RolloutEngine, policy: PreTrainedModel, cache: CacheAtUpdate
) -> None:
    """Each sample's random stream goes on where it was, whether or not what was written is read again."""
    requests = make_requests(SamplingParams(max_new_tokens=24))
    undisturbed = generate(engine, requests)
    engine.add(requests)
    finished: dict[int, Completion] = {}
    for version in range(6):
        sync(engine, policy, version, cache)
        for _ in range(1 + version):
            finished |= {completion.id: completion for completion in engine.step()}
    finished |= finish(engine)
    assert_same_tokens([finished[request.id] for request in requests], undisturbed)


def test_the_same_calls_repeat_to_the_bit_across_an_update(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=24))
    newer = random_policy(kind_of(policy), seed=1)
    runs = []
    for _ in range(2):
        sync(engine, policy, 0)
        engine.add(requests[:10])
        for _ in range(5):
            engine.step()
        sync(engine, newer, 1)
        engine.add(requests[10:])
        runs.append(finish(engine))
    for request in requests:
        for field in ("token_ids", "logprobs", "versions"):
            np.testing.assert_array_equal(*(getattr(run[request.id], field) for run in runs))


def test_requests_that_are_added_while_others_run_get_the_tokens_that_they_get_alone(engine: RolloutEngine) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=24))
    together = generate(engine, requests)
    finished: dict[int, Completion] = {}
    for start in range(0, 16, 2):
        engine.add(requests[start : start + 2])
        for _ in range(4):
            finished |= {completion.id: completion for completion in engine.step()}
    finished |= finish(engine)
    assert_same_tokens([finished[request.id] for request in requests], together)


def test_other_threads_may_ask_at_any_time_how_much_is_under_way(engine: RolloutEngine) -> None:
    seen: set[int] = set()

    def ask(is_over: threading.Event) -> None:
        # A thread that never waits would keep the interpreter from the one that generates.
        while not is_over.wait(1e-4):
            seen.add(engine.num_running + engine.num_waiting)

    with ThreadPoolExecutor(1) as thread:
        is_over = threading.Event()
        asking = thread.submit(ask, is_over)
        for _ in range(4):
            generate(engine, make_requests(SamplingParams(max_new_tokens=12)))
        is_over.set()
        asking.result(60)
    assert 16 in seen and seen <= set(range(33))


def test_what_finishes_in_a_step_comes_in_the_order_in_which_it_was_added(engine: RolloutEngine) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=2))[::-1]
    engine.add(requests)
    order = []
    while engine.num_running + engine.num_waiting:
        order += [completion.id for completion in engine.step()]
    assert order == [request.id for request in requests]
    assert engine.step() == []


def test_what_is_written_can_be_seen_between_two_steps(engine: RolloutEngine) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=12))
    undisturbed = generate(engine, requests)
    engine.add(requests)
    seen = {request.id: 0 for request in requests}
    parts: dict[int, tuple[list[int], list[float]]] = {request.id: ([], []) for request in requests}
    for num_steps in range(1, 100):
        newest = {completion.id: completion for completion in engine.step()}
        for id, completion in newest.items():
            start = seen.pop(id)
            parts[id][0].extend(completion.token_ids[start:].tolist())
            parts[id][1].extend(completion.logprobs[start:].tolist())
        written = engine.written({**seen, 99: 0})
        for id, new in written.items():
            assert len(new.token_ids) == len(new.logprobs) == 1
            parts[id][0].extend(new.token_ids)
            parts[id][1].extend(new.logprobs)
            seen[id] += 1
        assert written or newest or not seen
        if num_steps < 12:
            assert written.keys() == set(range(8)) and {len(parts[id][0]) for id in range(8)} == {num_steps}
        if not seen:
            break
    assert engine.written({request.id: 0 for request in requests}) == {}
    for completion in undisturbed:
        np.testing.assert_array_equal(parts[completion.id][0], completion.token_ids)
        np.testing.assert_allclose(parts[completion.id][1], completion.logprobs, rtol=0, atol=TOLERANCE)


def test_what_was_written_of_an_aborted_request_comes_back_and_the_others_go_on(engine: RolloutEngine) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=24))
    undisturbed = generate(engine, requests)
    engine.add(requests)
    for _ in range(6):
        engine.step()
    aborted = engine.abort([15, 99, 3, 0])
    assert [completion.id for completion in aborted] == [15, 3, 0]
    assert {completion.finish_reason for completion in aborted} == {"abort"}
    for completion in aborted:
        num_written = 0 if completion.id == 15 else 6
        assert completion.token_ids.shape == completion.logprobs.shape == completion.versions.shape == (num_written,)
        assert completion.versions.tolist() == [0] * num_written
        whole = undisturbed[completion.id]
        np.testing.assert_array_equal(completion.token_ids, whole.token_ids[:num_written])
        np.testing.assert_allclose(completion.logprobs, whole.logprobs[:num_written], rtol=0, atol=TOLERANCE)
    assert engine.abort([0, 3, 15]) == []
    engine.add([requests[3]])
    finished = finish(engine)
    assert finished.keys() == set(range(16)) - {0, 15}
    assert_same_tokens([finished[id] for id in sorted(finished)], [undisturbed[id] for id in sorted(finished)])


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_new_tokens=24), SamplingParams(max_new_tokens=24, temperature=0.7, top_k=10)],
    ids=["plain", "temperature-and-top-k"],
)
def test_ids_that_are_left_out_are_never_drawn_and_have_no_share_in_logprobs(
    engine: RolloutEngine, policy: PreTrainedModel, params: SamplingParams
) -> None:
    requests, left_out = make_requests(params), np.array([7, *range(24, VOCABULARY)])
    before = generate(engine, requests)
    assert np.isin(np.concatenate([completion.token_ids for completion in before]), left_out).mean() > 0.2
    engine.leave_out(left_out)
    completions = generate(engine, requests)
    assert not np.isin(np.concatenate([completion.token_ids for completion in completions]), left_out).any()
    assert_logprobs_match({0: policy}, requests, completions, left_out=left_out.tolist())
    engine.leave_out(np.array([], dtype=np.int64))
    assert_same_tokens(generate(engine, requests), before)


def test_greedy_tokens_equal_transformers_generate(engine: RolloutEngine, policy: Any) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=16, temperature=0.0), group_size=1)
    for request, completion in zip(requests, generate(engine, requests), strict=True):
        prompt = torch.from_numpy(request.token_ids).long()[None]
        expected = policy.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=16, eos_token_id=[]
        )
        np.testing.assert_array_equal(completion.token_ids, expected[0, prompt.shape[1] :].numpy())


def test_the_same_batch_repeats_to_the_bit(engine: RolloutEngine) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=24))
    for first, second in zip(generate(engine, requests), generate(engine, requests), strict=True):
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        np.testing.assert_array_equal(first.logprobs, second.logprobs)


def test_seeds_tell_samples_of_a_prompt_apart(engine: RolloutEngine) -> None:
    prompt, params = np.array([5, 6, 7], dtype=np.int32), SamplingParams(max_new_tokens=24)
    seeds = (0, 1, 2, 2**62, 2**63 - 1, 1)
    completions = generate(engine, [SampleRequest(i, prompt, seed, params) for i, seed in enumerate(seeds)])
    texts = [tuple(completion.token_ids) for completion in completions]
    assert len(set(texts)) == 5
    assert texts[1] == texts[5]


@pytest.mark.slow
def test_tokens_do_not_depend_on_what_else_is_in_the_batch(engine: RolloutEngine) -> None:
    requests = make_requests(SamplingParams(max_new_tokens=24))
    together = generate(engine, requests)
    assert_same_tokens(generate(engine, requests[::-1])[::-1], together)
    assert_same_tokens([generate(engine, [request])[0] for request in requests], together)


def test_each_request_has_parameters_of_its_own(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    kinds = [
        SamplingParams(max_new_tokens=9, temperature=0.0),
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=17, temperature=0.7, top_k=10),
        SamplingParams(max_new_tokens=24, temperature=0.8, stop_token_ids=(EOS, 20)),
    ]
    requests = [replace(request, params=kinds[request.id % 4]) for request in make_requests(kinds[0])]
    completions = generate(engine, requests)
    assert_logprobs_match({0: policy}, requests, completions)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.finish_reason == "stop" or len(completion.token_ids) == request.params.max_new_tokens
        assert_same_tokens([completion], generate(engine, [request]))
    assert "stop" in {completion.finish_reason for completion in completions[3::4]}


def test_a_stop_token_ends_a_completion_and_stays_in_it(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    params = SamplingParams(max_new_tokens=12, stop_token_ids=(EOS, 20))
    requests = make_requests(params)
    completions = generate(engine, requests)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        is_stop = np.isin(completion.token_ids, params.stop_token_ids)
        assert not is_stop[:-1].any()
        assert is_stop[-1] == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12
    assert_logprobs_match({0: policy}, requests, completions)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(engine: RolloutEngine) -> None:
    stop = ("aa", "bcd", "hgfe")
    params = SamplingParams(max_new_tokens=24)
    undisturbed = generate(engine, make_requests(params))
    stopping, requests = StopStrings(engine, tokenizer_of_pieces()), make_requests(replace(params, stop=stop))
    assert_ended_by_strings(generate(stopping, requests), undisturbed, stop)
    assert (stopping.num_running, stopping.num_waiting) == (0, 0)


def test_a_stop_string_across_an_update_leaves_each_token_its_version(
    engine: RolloutEngine, policy: PreTrainedModel
) -> None:
    policies = {0: policy, 1: random_policy(kind_of(policy), seed=1)}
    requests = make_requests(SamplingParams(max_new_tokens=24, repetition_penalty=1.2, stop=("aa", "bcd")))
    stopping = StopStrings(engine, tokenizer_of_pieces())
    stopping.add(requests)
    finished = {completion.id: completion for _ in range(5) for completion in stopping.step()}
    sync(stopping, policies[1], 1)
    finished |= finish(stopping)
    completions = [finished[request.id] for request in requests]
    assert_logprobs_match(policies, requests, completions)
    assert any(c.finish_reason == "stop" and set(c.versions) == {0, 1} for c in completions)


def test_nothing_but_the_given_stop_tokens_ends_a_completion(engine: RolloutEngine) -> None:
    completions = generate(engine, make_requests(SamplingParams(max_new_tokens=48)))
    assert [len(completion.token_ids) for completion in completions] == [48] * 16
    assert {completion.finish_reason for completion in completions} == {"length"}
    assert any(EOS in completion.token_ids[:-1] for completion in completions)


def test_a_completion_has_at_least_one_token_and_plain_arrays(engine: RolloutEngine) -> None:
    params = SamplingParams(max_new_tokens=1, stop_token_ids=tuple(range(VOCABULARY)))
    for completion in generate(engine, make_requests(params)):
        assert completion.token_ids.shape == completion.logprobs.shape == completion.versions.shape == (1,)
        assert completion.token_ids.dtype == completion.versions.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert completion.finish_reason == "stop"


def test_a_sync_with_an_unknown_name_names_it(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    weights = sent(policy) | {"model.layers.7.extra.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"model\.layers\.7\.extra\.weight"):
        engine.load_weights(weights.items(), 1)


def test_a_sync_with_another_shape_names_the_tensor_and_both_shapes(
    engine: RolloutEngine, policy: PreTrainedModel
) -> None:
    weights = sent(policy) | {"model.norm.weight": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*\(7,\).*\(64,\)"):
        engine.load_weights(weights.items(), 1)


def test_a_sync_that_leaves_a_weight_out_names_it(engine: RolloutEngine, policy: PreTrainedModel) -> None:
    weights = sent(policy)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight"):
        engine.load_weights(weights.items(), 1)
