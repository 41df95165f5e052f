"""A model on sets of problems: answers are drawn and judged, ends are scored, and all of it is kept.

sets --> [engine] --> completions --> [reward server] --> a line a sample --> estimates over problems
     --> [forward passes] ------------------------------> a line a problem -->
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlflow.actors.reward_server import RewardServer
from rlflow.data.errors import DataError
from rlflow.evaluation_sets.estimates import Estimate, estimate, majority_at_k, pass_at_k
from rlflow.evaluation_sets.sets import ProblemSet
from rlflow.progress import ProgressBar
from rlflow.recipe import RewardBlock
from rlflow.rewards import RewardError
from rlflow.rewards.answers import final_answer
from rlflow.rewards.score_batch import ScoringError, told
from rlflow.serving.batch import Job, answer_prompts
from rlflow.serving.models import EngineName, ServedModel, Settings, open_streams
from rlflow.serving.sampling import Sampling
from rlflow.serving.streams import Streams

Tell = Callable[[str], None]
_LONGEST = 2048
"""Tokens of a completion, where nobody says."""
_SANDBOX_S = 12.0
"""That one program may take, with what the sandbox takes to start."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How completions are drawn; None where the set, the run or the model says."""

    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    ks: tuple[int, ...] = ()
    """Of pass@k and maj@k; 1 and the number of samples when empty."""


@dataclass(frozen=True, slots=True)
class SetResult:
    """What was found on one set."""

    name: str
    kind: str
    num_problems: int
    samples: int
    """A problem."""
    estimates: Mapping[str, Estimate]
    """By metric: pass@1, maj@8, acc, acc_norm."""
    facts: Mapping[str, float]
    """What is no score: mean_tokens, truncated, unscored."""
    settings: Mapping[str, Any]
    seconds: float
    file: str
    """Of its samples."""

    def as_json(self) -> dict[str, Any]:
        scores = {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in self.estimates.items()}
        return {
            "set": self.name,
            "kind": self.kind,
            "problems": self.num_problems,
            "samples": self.samples,
            "scores": scores,
            **self.facts,
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 1),
            "file": self.file,
        }


def measure(
    model: ServedModel,
    sets: Sequence[ProblemSet],
    drawing: Drawing,
    engine: EngineName,
    settings: Settings,
    directory: Path,
    tell: Tell,
) -> list[SetResult]:
    """Measures all sets, and leaves a file of samples of each in a directory that exists.

    Raises:
        DataError: A set cannot be judged here, or the weights cannot be loaded.
        RunError: The engine failed.
    """
    generating = [one for one in sets if one.kind != "choice"]
    plans = {one.name: _sampling(model, one, drawing) for one in generating}
    results: dict[str, SetResult] = {}
    with ExitStack() as opened:
        # Before the weights are loaded: what cannot be judged is told at once.
        servers = {one.name: opened.enter_context(_reward_server(model, one, plans[one.name][1])) for one in generating}
        if generating:
            streams = open_streams(model, engine, {}, settings)
            opened.callback(streams.close)
            for one in generating:
                sampling, samples = plans[one.name]
                job = Job(model, model.source.name, sampling, samples, (_reward(one, samples),), settings.max_num_seqs)
                results[one.name] = _measure_answers(one, job, drawing, streams, servers[one.name], directory, tell)
    choices = [one for one in sets if one.kind == "choice"]
    if choices:
        scorer = _load_scorer(model)
        for one in choices:
            results[one.name] = _measure_choices(one, model, scorer, directory)
    return [results[one.name] for one in sets]


def _sampling(model: ServedModel, one: ProblemSet, drawing: Drawing) -> tuple[Sampling, int]:
    """How completions of a set are drawn, and how many of a prompt.

    Raises:
        DataError: Several greedy completions, or a k of more samples than there are.
    """
    samples = drawing.samples or one.samples or max(drawing.ks, default=1)
    if (most := max(drawing.ks, default=1)) > samples:
        raise DataError(f"{one.name}: k = {most} needs as many samples a problem: --samples {most}")
    temperature = one.temperature if drawing.temperature is None else drawing.temperature
    if drawing.temperature is None and not temperature:
        # One sample is the model's best answer; several must differ, as the run's rollouts did.
        temperature = (model.defaults.temperature or 1.0) if samples > 1 else 0.0
    if samples > 1 and not temperature:
        raise DataError(f"{one.name}: {samples} greedy completions are all the same: give --temperature")
    sampling = model.defaults.given(
        temperature=temperature,
        top_p=one.top_p if drawing.top_p is None else drawing.top_p,
        top_k=one.top_k if drawing.top_k is None else drawing.top_k,
        min_p=one.min_p,
        repetition_penalty=one.repetition_penalty,
        max_new_tokens=drawing.max_new_tokens or one.max_new_tokens or model.defaults.max_new_tokens or _LONGEST,
        seed=drawing.seed,
        stop=one.stop or None,
        ends=() if one.stop else one.ends,
    )
    return sampling, samples


def _reward(one: ProblemSet, samples: int) -> RewardBlock:
    """The set's, with the time that all samples of a prompt may take."""
    assert one.reward is not None
    if one.kind != "code":
        return one.reward
    return one.reward.model_copy(update={"timeout_s": max(one.reward.timeout_s, 5.0 + samples * _SANDBOX_S)})


@contextmanager
def _reward_server(model: ServedModel, one: ProblemSet, samples: int) -> Iterator[RewardServer]:
    recipe = model.source.recipe
    environment = () if recipe is None else recipe.reward_server.environment
    memory = {} if recipe is None else {"memory_gib": recipe.reward_server.memory_gib}
    try:
        server = RewardServer((_reward(one, samples),), 1, environment=environment, **memory)
    except RewardError as error:
        raise DataError(f"{one.name}: {error}") from error
    try:
        try:
            server.ready()
        except RewardError as error:
            raise DataError(f"{one.name}: {error}") from error
        yield server
    finally:
        server.close()


def _measure_answers(
    one: ProblemSet,
    job: Job,
    drawing: Drawing,
    streams: Streams,
    server: RewardServer,
    directory: Path,
    tell: Tell,
) -> SetResult:
    began, label = time.monotonic(), job.rewards[0].label
    path = directory / f"{one.name}.jsonl"
    passed: list[list[bool]] = []
    answers: list[list[str | None]] = []
    num_samples = num_passed = num_tokens = num_cut = num_unscored = 0
    errors: list[ScoringError] = []
    with ProgressBar(one.name, "problems") as bar, path.open("w", encoding="utf-8") as file:

        def show(done: int, total: int) -> None:
            bar.update(done, total, f"{100 * num_passed / max(1, num_samples):.1f}% pass")

        for rows, said in answer_prompts(one.prompts, job, streams, server, show):
            errors += said
            for row in rows:
                score = row["rewards"][label]
                row["passed"] = score is not None and score >= one.threshold
                row["answer"] = final_answer(row["response"]) if one.kind == "answer" else None
                num_samples += 1
                num_passed += row["passed"]
                num_unscored += score is None
                num_tokens += row["num_tokens"]
                num_cut += row["finish_reason"] == "length"
                if row["sample"] == 0:
                    passed.append([])
                    answers.append([])
                passed[-1].append(row["passed"])
                answers[-1].append(row["answer"])
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    for line in told(errors):
        tell(f"{one.name}: {line}")
    num = max(1, num_samples)
    return SetResult(
        name=one.name,
        kind=one.kind,
        num_problems=len(passed),
        samples=job.samples,
        estimates=_estimates(passed, answers, drawing.ks or (1, job.samples), is_voted=one.kind == "answer"),
        facts={"mean_tokens": num_tokens / num, "truncated": num_cut / num, "unscored": num_unscored / num},
        settings=_settings(job),
        seconds=time.monotonic() - began,
        file=path.name,
    )


def _estimates(
    passed: Sequence[Sequence[bool]], answers: Sequence[Sequence[str | None]], ks: Sequence[int], *, is_voted: bool
) -> dict[str, Estimate]:
    """pass@k of each k; maj@k of those above 1, where answers can be compared."""
    found: dict[str, Estimate] = {}
    for k in sorted(set(ks)):
        found[f"pass@{k}"] = estimate([pass_at_k(len(verdicts), sum(verdicts), k) for verdicts in passed])
    for k in sorted(set(ks)) if is_voted else ():
        if k > 1:
            votes = [majority_at_k(of_one, verdicts, k) for of_one, verdicts in zip(answers, passed, strict=True)]
            found[f"maj@{k}"] = estimate(votes)
    return found


def _settings(job: Job) -> dict[str, Any]:
    sampling, reward = job.sampling, job.rewards[0]
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": [*sampling.stop, *sampling.ends],
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "reward": reward.plugin or reward.name,
    }


def _load_scorer(model: ServedModel) -> Any:
    """The model as transformers and PEFT have it."""
    import torch

    from rlflow.actors.pretrained import load_language_model

    assert model.base.path is not None
    options: dict[str, Any] = {"dtype": getattr(torch, model.base.dtype)}
    options["trust_remote_code"] = model.base.trust_remote_code
    # PEFT puts no adapter on some formats as they are stored.
    options["as_stored"] = not model.source.is_adapter
    try:
        loaded: Any = load_language_model(model.base.path, **options)
        if model.source.is_adapter:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, model.source.path)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{model.source.path}: {error}") from error
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _measure_choices(one: ProblemSet, model: ServedModel, scorer: Any, directory: Path) -> SetResult:
    from rlflow.evaluation_sets.choices import best_of, score_choices

    began = time.monotonic()
    with ProgressBar(one.name, "choices") as bar:
        scores = score_choices(scorer, model.tokenizer, one.choices, model.context, bar.update)
    path, right, right_by_length = directory / f"{one.name}.jsonl", [], []
    with path.open("w", encoding="utf-8") as file:
        for problem, logprobs in zip(one.choices, scores, strict=True):
            chosen, by_length = best_of(logprobs), best_of(logprobs, problem.lengths)
            right.append(float(chosen == problem.right))
            right_by_length.append(float(by_length == problem.right))
            row = {
                "id": problem.id,
                "text": problem.text,
                "ends": problem.ends,
                "logprobs": logprobs,
                "right": problem.right,
                "chosen": chosen,
                "chosen_by_length": by_length,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return SetResult(
        name=one.name,
        kind=one.kind,
        num_problems=len(one.choices),
        samples=1,
        estimates={"acc": estimate(right), "acc_norm": estimate(right_by_length)},
        facts={},
        settings={"dtype": model.base.dtype},
        seconds=time.monotonic() - began,
        file=path.name,
    )
