"""One frozen dataclass a stage of the flow: Prompt -> Group of Rollouts -> Sample -> MicroBatch -> StepStats.

Lists until packing, arrays after. Everything here is numpy or plain Python: the driver imports no torch, and numpy
crosses Ray's object store without a copy.

Suffixes: ``P`` prompt tokens, ``C`` completion tokens, ``T = P + C`` tokens of one sequence, ``G`` rollouts of a
group, ``N`` tokens of a packed micro-batch, ``S`` sequences of a packed micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
"""Why a completion ended."""
RolloutEnd = Literal["stop", "length", "abort", "turns", "time", "error"]
"""Why a rollout ended: as a completion; or its turns or its time were used up before its environment was done, or that
failed."""
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What goes in: one row of the data, rendered and tokenised once."""

    id: str
    """Stable name of the row, ``<source>:<row>``: seeds and the ledger are keyed on it."""
    token_ids: np.ndarray
    """int32 [P]."""
    messages: Sequence[Message]
    """What ``token_ids`` were rendered from."""
    columns: Mapping[str, Any]
    """The row's other columns: reward functions receive them as keyword lists."""
    opened: str = ""
    """A tag such as ``<think>`` that the text of ``token_ids`` ends with: the policy goes on inside, and what is judged
    begins with it."""
    tools: Sequence[Any] = ()
    """Functions that it describes to the policy, as the chat template was given them."""
    images: tuple[bytes, ...] = ()
    """Its pictures, encoded (rlflow.data.images), in the order of their places in ``token_ids``."""
    engine_token_ids: np.ndarray | None = None
    """int32: ``token_ids`` with one placeholder a picture, as an engine is given them that repeats it itself; None
    without pictures."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When an episode ends that is not over by itself."""

    max_turns: int
    """Completions."""
    max_tokens: int
    """Behind the prompt: what the policy writes and what the environment says."""
    max_prompt_tokens: int
    """Of what an environment begins with."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. ``temperature == 0`` is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of these ends a completion; it is kept as the completion's last token."""
    min_p: float = 0.0
    """Tokens are cut that have less than this share of the most probable one's probability (arXiv 2407.01082), before
    top-k and top-p."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the prompt or the completion has are divided by it where they are positive and multiplied
    where they are negative, before the temperature (arXiv 1909.05858, section 4.1)."""
    stop: tuple[str, ...] = ()
    """A completion ends with the token that completes one of these in its text; it is kept."""


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One prompt that rollouts are asked for, one for each seed, and how they are drawn and scored."""

    id: int
    """Of no other group of the run."""
    prompt: Prompt
    seeds: tuple[int, ...]
    """One unsigned 63-bit seed a rollout; the same seed gives the same rollout."""
    params: SamplingParams
    epoch: int = 0
    limits: Limits | None = None
    """Of rollouts in an environment; None where a completion is a rollout."""
    min_version: int = 0
    """It is not begun with older weights."""
    num_greedy: int = 0
    """Of the last of its rollouts: they are drawn greedily."""
    labels: tuple[str, ...] = ()
    """Of the reward functions that score it."""
    priority: tuple[int, ...] = ()
    """Lower comes first where there is no room for all."""
    is_pinned: bool = False
    """It belongs to one worker, and is asked for again together with all that was asked of it then: so the same
    completions are batched with each other, and have the same bits."""

    def params_of(self, index: int) -> SamplingParams:
        """How its rollout ``index`` is drawn."""
        return replace(self.params, temperature=0.0) if self.is_greedy(index) else self.params

    def is_greedy(self, index: int) -> bool:
        return index >= len(self.seeds) - self.num_greedy

    @property
    def max_sampled_tokens(self) -> int:
        """The most that the policy writes in one rollout."""
        return self.params.max_new_tokens if self.limits is None else self.limits.max_tokens

    def to_send(self) -> GroupRequest:
        """Itself, without what an engine does not read of the prompt: an environment reads all of it."""
        if self.limits is not None:
            return self
        return replace(self, prompt=replace(self.prompt, messages=(), columns={}, tools=()))


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion that an engine is asked for."""

    id: int
    """Of no other request that the engine has."""
    token_ids: np.ndarray
    """int32 [P]: what it goes on from."""
    seed: int
    """Unsigned, 63 bits: with the weights and the parameters it decides the completion."""
    params: SamplingParams
    images: tuple[bytes, ...] = ()
    """The pictures in ``token_ids``, encoded."""
    engine_token_ids: np.ndarray | None = None
    """int32: ``token_ids`` with one placeholder a picture; None without pictures."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one request: tokens, and the logprobs they were drawn with."""

    id: int
    """Of the request."""
    token_ids: np.ndarray
    """int32 [C], the stop token included when one was drawn."""
    logprobs: np.ndarray
    """float32 [C]: log-probability of each token under the distribution it was drawn from."""
    versions: np.ndarray
    """int32 [C]: of the weights that sampled each token."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Episode:
    """What happened in a rollout of several turns, beside its tokens."""

    messages: tuple[Message, ...]
    """All that follows the prompt: what the policy said, with its calls, and what it heard."""
    prompt: tuple[Message, ...] | None = None
    """What the environment began with in the place of the row's messages; None where those stood."""
    starts: tuple[int, ...] = (0,)
    """Where its sequences begin among the rollout's tokens. A chat template that rewrites what was said before (it cuts
    thoughts) begins a new one; a token that was sampled is marked as sampled in one of them alone."""
    num_turns: int = 1
    """Completions."""
    reward: float = 0.0
    """The environment's own, of all steps; NaN where it failed."""
    state: Any = None
    """What the environment says of itself at the end; JSON could hold it."""
    error: str = ""
    """Why the environment failed; empty where it did not. The rollout is then unscored."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """``tool_calls``, those that failed or could not be read, and what else the environment counts."""
    environment_s: float = 0.0
    """That the environment took."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The rollouts of several groups, end to end: what travels. Rollout r is ``[offsets[r]:offsets[r + 1]]`` of each
    per-token array; those of a group stand next to each other, in the order of its seeds."""

    group_ids: tuple[int, ...]
    """Of their requests."""
    sizes: tuple[int, ...]
    """Rollouts of each group."""
    offsets: np.ndarray
    """int64 [R + 1]."""
    token_ids: np.ndarray
    """int32 [sum of T]: prompt, completion, and with several turns what stands between."""
    is_sampled: np.ndarray
    """bool [sum of T]: the tokens that the policy wrote."""
    logprobs: np.ndarray
    """float32 [sum of T]: of the distribution that each token was drawn from; 0 where none was."""
    versions: np.ndarray
    """int32 [sum of T]: of the weights that sampled each token; -1 where none was."""
    finish_reasons: tuple[RolloutEnd, ...]
    """Why each rollout ended."""
    texts: tuple[str, ...]
    """What the policy wrote, decoded for reward functions and for people, special tokens included but stop tokens and
    padding; training never reads them."""
    episodes: tuple[Episode, ...] = ()
    """Of each rollout; none where every rollout is one completion."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One episode: a flat token stream, and everything that is known of it once it is scored."""

    token_ids: np.ndarray
    """int32 [T]: prompt and completion; with several turns what stands between, and its sequences end to end."""
    is_sampled: np.ndarray
    """bool [T]: the tokens that the policy wrote."""
    logprobs: np.ndarray
    """float32 [T], as the engine reported them; 0 where the policy wrote nothing."""
    versions: np.ndarray
    """int32 [T]: of the weights that sampled each token; -1 where the policy wrote nothing."""
    finish_reason: RolloutEnd
    text: str
    rewards: Mapping[str, float] = field(default_factory=dict)
    """By function; NaN where the function abstained or failed."""
    reward: float = float("nan")
    """Weighted sum; NaN when the rollout is unscored (masked, and left out of the group's baseline)."""
    error: str = ""
    """Which reward functions failed on it, and why; empty when none did."""
    episode: Episode | None = None
    """Of a rollout in an environment."""
    is_baseline: bool = False
    """It was drawn greedily for the baseline of its group: its reward counts there, and it is not trained."""

    @property
    def sequences(self) -> list[slice]:
        """Where its sequences are among its tokens: one, but where a chat template has rewritten what was said."""
        starts = (0,) if self.episode is None else self.episode.starts
        return [slice(start, end) for start, end in pairwise([*starts, len(self.token_ids)])]

    @property
    def num_prompt_tokens(self) -> int:
        """P: those before the first that the policy wrote."""
        return int(self.is_sampled.argmax())

    @property
    def completion_ids(self) -> np.ndarray:
        """int32 [C]: what the policy wrote."""
        return self.token_ids[self.is_sampled]


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one prompt, G of them: as many as it has."""

    prompt: Prompt
    epoch: int
    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> np.ndarray:
        """float32 [G]."""
        return np.array([rollout.reward for rollout in self.rollouts], dtype=np.float32)

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled any of its tokens."""
        return min(int(rollout.versions[rollout.is_sampled].min()) for rollout in self.rollouts)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on: a flat token stream, an explicit mask, aligned per-token fields.

    Every per-token array has length T and speaks of the token at its own position: ``old_logprobs[t]`` is the
    log-probability of ``token_ids[t]`` given ``token_ids[:t]``. Position 0 is never trained.
    """

    token_ids: np.ndarray
    """int32 [T]."""
    loss_mask: np.ndarray
    """bool [T]: the tokens that are trained. Never inferred from pad or eos."""
    loss_weights: np.ndarray
    """float32 [T]: the reduction, already divided by its global denominator; 0 outside ``loss_mask``.
    The loss of a batch is the sum over its tokens of ``loss_weights * per_token_loss``."""
    advantages: np.ndarray | None = None
    """float32 [T]."""
    old_logprobs: np.ndarray | None = None
    """float32 [T]: of the policy that sampled, as its engine reported them; 0 outside the completion. Absent where
    sampling was cut, and they are of another distribution than the trainer's."""
    proximal_logprobs: np.ndarray | None = None
    """float32 [T]: the trainer's own, before the first update of the batch; absent with a single update, when they are
    the current ones."""
    ref_logprobs: np.ndarray | None = None
    """float32 [T]: of the reference."""
    teacher_logprobs: np.ndarray | None = None
    """float32 [T]: of the teacher."""
    teacher_hidden: np.ndarray | None = None
    """[T, H]: what the teacher's head makes logits of for each loss token, float32, or the bits of 16-bit numbers as
    uint16; 0 elsewhere."""
    teacher_top: np.ndarray | None = None
    """float32 [T, k + 1, 2]: ids and logprobs of the tokens that the teacher finds most probable at each loss token,
    then -1 and the logprob of all others together. Ids are exact: they are below 2^24."""
    old_values: np.ndarray | None = None
    """float32 [T]: the critic's, before the update (PPO)."""
    returns: np.ndarray | None = None
    """float32 [T] (PPO)."""
    selected: np.ndarray | None = None
    """float32 [T]: 1 at the tokens that the loss treats apart (clip_cov, kl_cov)."""
    group: int = 0
    """Which prompt, pair or row of its batch it is of: reductions over groups count these."""
    rollout: int | None = None
    """Which rollout of its batch it is of, where one may be several sequences, which stand next to each other and are
    counted as one; None where each is one."""
    label: float = 0.0
    """+1 chosen or desirable, -1 rejected or undesirable; beside rollouts, +1 a demonstration. Of sequences: see
    rlflow.data.sequences."""
    targets: np.ndarray | None = None
    """Classification: float32 [K]."""
    text: int | None = None
    """Embedding, reranking: the first sample of its batch that has the same tokens."""
    reward_margin: float | None = None
    """Reward modelling: by how much the chosen answer of its pair should win."""
    rank_margin: float | None = None
    """aot: by how much the reference's log-ratio of its pair's rank exceeds the pair's own."""
    rank_partner: float | None = None
    """aot_unpaired: the score of the other side's answer of its rank."""
    batch_kl: float | None = None
    """kto: the KL of the batch."""
    images: tuple[bytes, ...] = ()
    """The pictures in ``token_ids``, encoded, in the order of their places."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences packed end to end, without padding: what one forward pass sees."""

    token_ids: np.ndarray
    """int32 [N]."""
    position_ids: np.ndarray
    """int32 [N], from 0 in every sequence."""
    cu_seqlens: np.ndarray
    """int32 [S + 1]: sequence s is ``token_ids[cu_seqlens[s]:cu_seqlens[s + 1]]``."""
    loss_mask: np.ndarray
    """bool [N]."""
    loss_weights: np.ndarray
    """float32 [N]."""
    sample_indices: np.ndarray
    """int32 [S]: which sample of the batch each sequence is; -1 for filler that keeps ranks in step."""
    labels: np.ndarray
    """float32 [S]."""
    targets: np.ndarray | None = None
    """float32 [S, K]."""
    groups: np.ndarray | None = None
    """float32 [S], as the five that follow."""
    texts: np.ndarray | None = None
    reward_margins: np.ndarray | None = None
    rank_margins: np.ndarray | None = None
    rank_partners: np.ndarray | None = None
    batch_kls: np.ndarray | None = None
    advantages: np.ndarray | None = None
    """float32 [N], as all that follow."""
    old_logprobs: np.ndarray | None = None
    proximal_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    teacher_logprobs: np.ndarray | None = None
    teacher_hidden: np.ndarray | None = None
    """[N, H], as in Sample."""
    teacher_top: np.ndarray | None = None
    """float32 [N, k + 1, 2], as in Sample."""
    old_values: np.ndarray | None = None
    returns: np.ndarray | None = None
    selected: np.ndarray | None = None
    images: tuple[tuple[bytes, ...], ...] = ()
    """Of each sequence its pictures, encoded; none where no sequence of the batch has any."""


@dataclass(frozen=True, slots=True)
class Denominators:
    """Global counts of one optimizer batch, computed once and passed in: no split of the batch can change a loss."""

    num_tokens: int
    """Loss tokens."""
    num_sequences: int
    """Sequences with at least one loss token; those of one rollout are one."""
    num_groups: int
    """Prompts (online) or pairs (preference data) among them."""


@dataclass(slots=True)
class StepStats:
    """What one step reports. Keys are ``group/name``."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
