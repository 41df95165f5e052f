"""Window: which groups are asked for, how old their tokens may be, which are trained, and the ledger of all of them.

    release(step)   asks for the groups of every step up to ``step + max_staleness``
    take(step)      waits for those of ``step``: whole, scored, in the order in which they were drawn

A step's prompts are drawn and asked for when the step that lies ``max_staleness`` before it begins, and may be begun
with no older weights: so no token is older than that when it is trained. Where the algorithm asks for groups with
signal, those without are replaced by new prompts as soon as a round is whole, whether or not somebody waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rlflow.algorithms.advantages import has_signal
from rlflow.data.sampler import Sampler
from rlflow.driver.answers import Answers
from rlflow.driver.assemble import scored_group
from rlflow.driver.errors import RunError
from rlflow.driver.pool import RolloutPool
from rlflow.driver.rollout_report import RolloutReport
from rlflow.driver.sampling import episode_limits, sample_seed
from rlflow.recipe import Recipe
from rlflow.rewards.score_batch import ScoreBatch
from rlflow.tracking.tracker import Tracker
from rlflow.types import Group, GroupRequest, Prompt, SamplingParams

_MOST_REDONE = 3


@dataclass(slots=True)
class Ledger:
    """issued = trained + filtered + in flight: nothing is lost or counted twice."""

    issued: int = 0
    trained: int = 0
    filtered: int = 0

    @property
    def in_flight(self) -> int:
        return self.issued - self.trained - self.filtered

    def metrics(self) -> dict[str, float]:
        """Groups, counted since the run began."""
        return {
            "group/issued": float(self.issued),
            "group/trained": float(self.trained),
            "group/filtered": float(self.filtered),
            "group/in_flight": float(self.in_flight),
        }


@dataclass(slots=True)
class StepGroups:
    """What was drawn for a step, and what has come of it."""

    step: int
    """Counted from 0."""
    first: list[tuple[int, int]]
    """(epoch, row) of what was drawn for it first."""
    drawn: list[tuple[int, int]] = field(default_factory=list)
    """Of what was asked for; replacements behind those that they replace."""
    places: dict[int, int] = field(default_factory=dict)
    """Of those that workers were asked for: id of the request -> place in ``drawn``."""
    groups: dict[int, Group | None] = field(default_factory=dict)
    """By place in ``drawn``; None where it was dropped for its age."""
    redone: dict[int, int] = field(default_factory=dict)
    """Place -> how often its group was too old."""
    rounds: int = 0
    is_whole: bool = False
    report: RolloutReport = field(default_factory=RolloutReport)


class Window:
    def __init__(
        self,
        pool: RolloutPool,
        recipe: Recipe,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        num_steps: int,
        tracker: Tracker,
        answers: Answers | None = None,
    ) -> None:
        """
        Args:
            answers: Of the data, which some rows are trained on in the place of the policy's own.
        """
        self.answers = answers
        self.pool, self.recipe, self.prompts, self.params, self.num_steps = pool, recipe, prompts, params, num_steps
        self.tracker = tracker
        self.limits = episode_limits(recipe, params.max_new_tokens)
        self.sampler = Sampler(len(prompts), seed=recipe.run.seed, shuffle=recipe.data.shuffle)
        self.ledger = Ledger()
        self.steps: dict[int, StepGroups] = {}
        """Those that are drawn and not yet trained."""
        self.at_hand: tuple[int, list[Group]] = (0, [])
        """The step, counted from 0, that was asked for last, and what of it has come."""
        self.too_old = 0
        """Groups in which a token was older than it may be."""
        self._drawn: dict[int, list[tuple[int, int]]] = {}
        """Of steps that an earlier process has drawn first, and not trained."""
        self._spare: list[tuple[int, int]] = []
        """What it had drawn to replace others, and not trained."""
        self._next = 0
        self._unscored_in_a_row = 0

    @property
    def max_staleness(self) -> int:
        return self.recipe.run.max_staleness

    def release(self, step: int) -> None:
        """Asks for the groups of every step that may be under way while ``step`` is trained; waits for nothing."""
        with self.pool.lock:
            while self._next <= min(step + self.max_staleness, self.num_steps - 1):
                first = self._drawn.pop(self._next, None) or self.sampler.take(self.recipe.data.prompts_per_step)
                self.steps[self._next] = groups = StepGroups(self._next, first)
                self._ask(groups, first)
                self._next += 1

    def take(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """The groups of ``step``, whole and scored, and the metrics of making them.

        Where not enough groups have signal after ``max_resamples`` rounds, the first ones without fill up.

        Raises:
            RunError: Too many rollouts could not be scored, or none in too many steps in a row.
            Whatever has ended the pool.
        """
        groups = self.steps[step]
        began = time.perf_counter()

        def tell() -> None:
            self.at_hand = (step, _in_order(groups))
            self.tracker.progress("generating", len(groups.groups), len(groups.drawn))

        self.pool.wait_until(lambda: groups.is_whole, tell)
        waited_s = time.perf_counter() - began
        with self.pool.lock:
            self.at_hand = (step, _in_order(groups))
            trained, num_left_out = self._choose(groups)
            del self.steps[step]
            self.ledger.trained += len(trained)
            self.ledger.filtered += num_left_out
            # The ledger is counted from what happened; what is open is looked at where it lies.
            open_groups = sum(len(of_step.drawn) for of_step in self.steps.values())
            assert self.ledger.in_flight == open_groups, f"{self.ledger} and {open_groups} groups are open"
        self._judge(groups.report, step + 1)
        flow = {f"flow/{name}": float(count) for name, count in self.pool.counts().items()}
        metrics = groups.report.metrics() | self.ledger.metrics() | self.pool.metrics() | flow
        metrics |= {
            "group/resampled": float(len(groups.drawn) - len(groups.first)),
            "group/too_old": float(self.too_old),
            "time/trainer_waits_s": waited_s,
        }
        return trained, metrics

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: what was drawn and not yet trained is generated again."""
        with self.pool.lock:
            # Those of steps that are not asked for again yet are among them.
            left = [*((step, groups.first) for step, groups in self.steps.items()), *self._drawn.items()]
            spare = [
                *self._spare,
                *(row for groups in self.steps.values() for row in groups.drawn[len(groups.first) :]),
            ]
            counts = {"trained": self.ledger.trained, "filtered": self.ledger.filtered}
            return {"sampler": self.sampler.state(), "drawn": left, "spare": spare, "ledger": counts}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Goes on at ``step``, counted from 0."""
        self._next = step
        self.sampler.restore(state["sampler"])
        self._drawn = {of_step: [(epoch, row) for epoch, row in rows] for of_step, rows in state.get("drawn", [])}
        self._spare = [(epoch, row) for epoch, row in state.get("spare", [])]
        counts = state.get("ledger", {"trained": 0, "filtered": 0})
        self.ledger = Ledger(counts["trained"] + counts["filtered"], counts["trained"], counts["filtered"])

    def _ask(self, groups: StepGroups, rows: Sequence[tuple[int, int]]) -> None:
        """Asks for one round of a step's groups."""
        places = range(len(groups.drawn), len(groups.drawn) + len(rows))
        groups.drawn += rows
        groups.rounds += 1
        self.ledger.issued += len(rows)
        oldest = max(0, groups.step - self.max_staleness)
        given = {} if self.answers is None else self._answered(self.answers, groups, places)
        groups.groups |= given
        requests = [self._request(groups, place, oldest) for place in places if place not in given]
        self.pool.ask(requests, partial(self._arrived, groups))
        self._settle(groups)

    def _answered(self, answers: Answers, groups: StepGroups, places: Iterable[int]) -> dict[int, Group]:
        """The groups that nobody generates, by place: the data has their answers."""
        drawn = ((place, *groups.drawn[place]) for place in places)
        found = {place: answers.group(self.prompts[row], epoch, groups.step) for place, epoch, row in drawn}
        groups.report.scored += sum(group is not None for group in found.values())
        return {place: group for place, group in found.items() if group is not None}

    def _request(self, groups: StepGroups, place: int, min_version: int) -> GroupRequest:
        epoch, row = groups.drawn[place]
        prompt, algorithm = self.prompts[row], self.recipe.online
        seeds = (sample_seed(self.recipe.run.seed, prompt.id, epoch, g) for g in range(algorithm.rollouts_per_prompt))
        request = GroupRequest(
            self.pool.next_id(),
            prompt,
            tuple(seeds),
            self.params,
            epoch,
            self.limits,
            min_version,
            num_greedy=algorithm.advantage.num_greedy,
            labels=tuple(block.label for block in self.recipe.rewards),
            priority=(1, groups.step, place),
            is_pinned=self.max_staleness == 0,
        )
        groups.places[request.id] = place
        return request

    def _arrived(self, groups: StepGroups, request: GroupRequest, unscored: Group, scores: ScoreBatch) -> None:
        """Takes a group; the pool's lock is held."""
        place, group = groups.places.pop(request.id), None
        oldest = unscored.oldest_version
        if groups.step - oldest > self.max_staleness:
            self.too_old += 1
            is_last = len(groups.groups) + 1 == len(groups.drawn) and not any(groups.groups.values())
            if self.recipe.rollout.at_update.too_old == "redo" or is_last:
                self._redo(groups, place, oldest)
                return
        else:
            group = scored_group(unscored, scores, self.recipe.rewards, self.recipe.online)
        groups.report.add(len(unscored.rollouts), scores)
        groups.groups[place] = group
        self._settle(groups)

    def _settle(self, groups: StepGroups) -> None:
        """Where all that was asked for is there: asks for more, or says that the step is whole."""
        if len(groups.groups) < len(groups.drawn):
            return
        missing = self._num_missing(groups)
        if missing and groups.rounds <= self.recipe.online.groups.max_resamples:
            kept, self._spare = self._spare[:missing], self._spare[missing:]
            self._ask(groups, [*kept, *self.sampler.take(missing - len(kept))])
        else:
            groups.is_whole = True

    def _redo(self, groups: StepGroups, place: int, version: int) -> None:
        """Asks for a group again that this version has sampled; raises RunError where that has not helped."""
        groups.redone[place] = times = groups.redone.get(place, 0) + 1
        oldest = max(0, groups.step - self.max_staleness)
        if times > _MOST_REDONE:
            raise RunError(
                f"step {groups.step + 1}: a group was sampled by policy version {version}, and none older than "
                f"{oldest} may have (run.max_staleness: {self.max_staleness}); {_MOST_REDONE} new tries were as old: "
                "newer weights do not reach a worker's engine"
            )
        again = replace(self._request(groups, place, oldest), is_pinned=False)
        self.pool.ask([again], partial(self._arrived, groups))

    def _is_wanted(self, group: Group | None) -> bool:
        return group is not None and (not self.recipe.online.groups.require_signal or has_signal(group.rewards))

    def _num_missing(self, groups: StepGroups) -> int:
        if not self.recipe.online.groups.require_signal:
            return 0
        return max(0, len(groups.first) - sum(self._is_wanted(group) for group in groups.groups.values()))

    def _choose(self, groups: StepGroups) -> tuple[list[Group], int]:
        """What is trained, in the order in which it was drawn, and how many groups are not."""
        in_order = [groups.groups[place] for place in range(len(groups.drawn))]
        wanted = [self._is_wanted(group) for group in in_order]
        fill = len(groups.first) - sum(wanted)
        chosen: list[Group] = []
        for group, is_wanted in zip(in_order, wanted, strict=True):
            if group is None:
                continue
            if not is_wanted and fill <= 0:
                continue
            fill -= not is_wanted
            chosen.append(group)
        return chosen, len(in_order) - len(chosen)

    def _judge(self, report: RolloutReport, step: int) -> None:
        """Says what could not be scored; raises RunError where that is too much."""
        report.require_few_errors(self.recipe.reward_server.max_error_fraction)
        if report.failed:
            self.tracker.message(f"step {step}: {report.account}")
        self._unscored_in_a_row = 0 if report.scored else self._unscored_in_a_row + 1
        if report.scored:
            return
        limit = self.recipe.run.max_skipped_steps
        said = f"step {step}: none of its {report.rows} rollouts has a reward: {report.silence}"
        if self._unscored_in_a_row < limit:
            self.tracker.message(f"{said}. Nothing is trained in this step")
            return
        raise RunError(
            f"{said}. So it was in {limit} steps in a row (run.max_skipped_steps), and nothing was trained. A reward "
            "abstains (None) where it finds nothing to compare with: look at the columns that it reads, e.g. with "
            "data.train.columns: {solution: answer}"
        )


def _in_order(groups: StepGroups) -> list[Group]:
    return [group for _, group in sorted(groups.groups.items()) if group is not None]
