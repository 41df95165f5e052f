"""Answers to the rows of a data set, as JSON lines in the order of the data, with rewards beside them.

prompts -> a window of requests -> [engine] -> whole prompts, in order -> [reward server] -> lines
"""

from __future__ import annotations

import json
import math
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlflow.actors.reward_server import RewardServer
from rlflow.actors.rollout_worker import decode_completions
from rlflow.algorithms.advantages import combine_rewards
from rlflow.data.answer_text import AnswerText
from rlflow.data.errors import DataError
from rlflow.data.videos import media_columns
from rlflow.driver.errors import RunError
from rlflow.driver.sampling import sample_seed
from rlflow.recipe import RewardBlock
from rlflow.rewards.score_batch import GroupTexts, ScoringError
from rlflow.serving.conversation import SILENCE_S, room_behind
from rlflow.serving.models import ServedModel
from rlflow.serving.sampling import Sampling
from rlflow.serving.streams import Ask, Piece, Streams
from rlflow.types import Prompt

SCORED_AT_ONCE = 64
"""Prompts, at most, in one call of the reward server."""
AHEAD = 4
"""Times the answers that are written at a time are asked for: what waits at the engine, and on those before it."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of every prompt."""

    model: ServedModel
    name: str
    """Of the model that answers."""
    sampling: Sampling
    samples: int
    """Answers a prompt."""
    rewards: tuple[RewardBlock, ...]
    max_num_seqs: int


@dataclass(slots=True)
class _Sample:
    """An answer on its way."""

    decoder: AnswerText
    id: int = -1
    """Of the request."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(slots=True)
class _Question:
    prompt: Prompt
    seeds: list[int]
    samples: list[_Sample]

    @property
    def is_done(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)


def read_answers(path: Path, prompts: Sequence[Prompt], job: Job) -> int:
    """How many prompts a file has the answers of, for one that goes on. What a stopped process left of a prompt, a
    half-written line too, is cut off.

    Raises:
        DataError: It holds something else than the first answers of this call.
    """
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    wanted = ((p.id, g, seed) for p in prompts for g, seed in enumerate(seeds_of(p, job)))
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found = (row["id"], row["sample"], row["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: is no answer: name another --output") from error
        expected = next(wanted, None)
        if found[:2] != (expected and expected[:2]):
            raise DataError(
                f"{path}, line {number}: is the answer to {found[0]}, sample {found[1]}, which is not this data's: "
                "name another --output"
            )
        if found != expected:
            raise DataError(f"{path}, line {number}: was drawn with another --seed: give that, or another --output")
    whole = len(lines) // job.samples
    with path.open("r+b") as file:
        file.truncate(sum(map(len, lines[: whole * job.samples])))
    return whole


def seeds_of(prompt: Prompt, job: Job) -> list[int]:
    """A seed a sample, of the seed of the call and the names of prompt and sample alone."""
    return [sample_seed(job.sampling.seed or 0, prompt.id, 0, g) for g in range(job.samples)]


def answer_prompts(
    prompts: Sequence[Prompt],
    job: Job,
    streams: Streams,
    server: RewardServer | None,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[list[dict[str, Any]], list[ScoringError]]]:
    """Rows of the output, some prompts' at a time, in their order; and what went wrong in rewards.

    Args:
        progress: Called with how many prompts are answered, and how many there are.

    Raises:
        RunError: The engine failed, or says nothing for too long.
    """
    pieces: queue.SimpleQueue[tuple[_Sample, Piece]] = queue.SimpleQueue()
    under_way: deque[_Question] = deque()
    waiting, num_done = deque(prompts), 0
    ahead = max(1, AHEAD * job.max_num_seqs // job.samples)
    while waiting or under_way:
        while waiting and len(under_way) < ahead:
            under_way.append(_ask(waiting.popleft(), job, streams, pieces.put))
        # Of more than are scored at once the rest is done already, and nothing more may come.
        if not under_way[0].is_done:
            _take(pieces, streams)
        done: list[_Question] = []
        while under_way and under_way[0].is_done and len(done) < SCORED_AT_ONCE:
            done.append(under_way.popleft())
        if done:
            num_done += len(done)
            yield _rows(done, job, server)
            progress(num_done, len(prompts))


def _ask(prompt: Prompt, job: Job, streams: Streams, put: Callable[[tuple[_Sample, Piece]], None]) -> _Question:
    model, seeds = job.model, seeds_of(prompt, job)
    params = job.sampling.params(model.stop_token_ids, room_behind(prompt.token_ids, model))
    samples = [_Sample(AnswerText(model.tokenizer, model.hidden, job.sampling.stop)) for _ in seeds]

    def teller(sample: _Sample) -> Callable[[Piece], None]:
        return lambda piece: put((sample, piece))

    pairs = zip(samples, seeds, strict=True)
    shown = (prompt.images, prompt.engine_token_ids)
    asks = [Ask(job.name, prompt.token_ids, seed, params, teller(sample), *shown) for sample, seed in pairs]
    ids = streams.submit(asks)
    for sample, id_ in zip(samples, ids, strict=True):
        sample.id = id_
    return _Question(prompt, seeds, samples)


def _take(pieces: queue.SimpleQueue[tuple[_Sample, Piece]], streams: Streams) -> None:
    """Waits for a piece, and takes all that have come by then."""
    try:
        sample, piece = pieces.get(timeout=SILENCE_S)
    except queue.Empty:
        raise RunError(f"the engine has written nothing for {SILENCE_S:g} s") from None
    while True:
        if piece.finish_reason == "error":
            raise RunError(f"the engine failed: {piece.error}")
        if not sample.finish_reason:
            sample.token_ids += piece.written.token_ids
            sample.text += sample.decoder.push(piece.written.token_ids)
            if sample.decoder.is_stopped:
                sample.finish_reason = "stop"
                streams.cancel([sample.id])
            elif piece.finish_reason is not None:
                sample.text += sample.decoder.finish()
                sample.finish_reason = piece.finish_reason
        try:
            sample, piece = pieces.get_nowait()
        except queue.Empty:
            return


def _rows(
    done: Sequence[_Question], job: Job, server: RewardServer | None
) -> tuple[list[dict[str, Any]], list[ScoringError]]:
    rows: list[dict[str, Any]] = []
    for question in done:
        prompt = question.prompt
        images = media_columns(prompt.images)
        for g, (sample, seed) in enumerate(zip(question.samples, question.seeds, strict=True)):
            answer = {"role": "assistant", "content": prompt.opened + sample.text}
            rows.append(
                {
                    "id": prompt.id,
                    "sample": g,
                    "messages": [*prompt.messages, answer],
                    **images,
                    "response": sample.text,
                    "finish_reason": sample.finish_reason,
                    "num_tokens": len(sample.token_ids),
                    "seed": seed,
                    "columns": dict(prompt.columns),
                }
            )
    if server is None:
        return rows, []
    scores = server.score([_texts(question, job) for question in done])
    blocks = job.rewards
    by_function = np.stack([scores.rewards[block.label] for block in blocks])
    failed = np.stack([scores.failed[block.label] for block in blocks])
    weights = np.array([block.weight for block in blocks])
    combined = combine_rewards(by_function[:, None], failed[:, None], weights, "sum", 0, 0.0)[0]
    for index, row in enumerate(rows):
        row["rewards"] = {block.label: _number(by_function[k, index]) for k, block in enumerate(blocks)}
        row["reward"] = _number(combined[index])
    return rows, list(scores.errors)


def _texts(question: _Question, job: Job) -> GroupTexts:
    """As reward functions read them in training: special tokens included, but for stop tokens and padding."""
    written = [np.array(sample.token_ids, dtype=np.int32) for sample in question.samples]
    if job.sampling.stop:
        texts = tuple(sample.text for sample in question.samples)
    else:
        texts = decode_completions(job.model.tokenizer, written, [job.model.stop_token_ids] * len(written))
    return GroupTexts(question.prompt, texts, tuple(ids.tobytes() for ids in written))


def _number(value: float) -> float | None:
    """None where nobody gave one."""
    return None if math.isnan(value) else float(value)
