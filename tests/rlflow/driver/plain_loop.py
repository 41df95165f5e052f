"""Every online row as one plain loop: torch and transformers, one sequence after the other, from rollouts on disk.

It shares nothing with what it checks. A step is what the papers' equations say of the step's rollouts: their tokens,
the engine's logprobs and the rewards are all that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

EPS, MAX_GRAD_NORM, LEARNING_RATE, CRITIC_LEARNING_RATE = 1e-3, 1.0, 1e-2, 5e-2
TEMPERATURE = 0.8
GROUP, UPDATES, EPOCHS = 2, 2, 2
Tensor = torch.Tensor


@dataclass
class Rollout:
    """One row of a step's file."""

    prompt: list[int]
    completion: list[int]
    engine: Tensor
    """[L], of the engine that sampled."""
    reward: float
    is_truncated: bool
    is_baseline: bool = False
    trained: bool = True
    kl: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[L], what the KL takes off each token's reward."""
    advantages: Tensor = field(default_factory=lambda: torch.zeros(0))
    before: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[L], the trainer's logprobs before the first update."""
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: Tensor = field(default_factory=lambda: torch.zeros(0))
    marked: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[L], bool: the tokens whose covariance counts."""


def clip(low: float, high: float, dual: float | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(w: Tensor, logprobs: Tensor, a: Tensor) -> Tensor:
        pessimistic = -torch.min(w * a, w.clamp(1 - low, 1 + high) * a)
        return pessimistic if dual is None else torch.where(a < 0, torch.min(pessimistic, -dual * a), pessimistic)

    return loss


def cispo(w: Tensor, logprobs: Tensor, a: Tensor) -> Tensor:
    return -w.detach().clamp(0.0, 5.0) * a * logprobs


def sapo(w: Tensor, logprobs: Tensor, a: Tensor) -> Tensor:
    tau = torch.where(a > 0, 1.0, 1.05)
    return -4 / tau * torch.sigmoid(tau * (w - 1)) * a


def gmpo(w: Tensor, logprobs: Tensor, a: Tensor) -> Tensor:
    u = w.log()
    held = torch.where(a > 0, torch.min(u, u.clamp(-0.4, 0.4)), torch.max(u, u.clamp(-0.4, 0.4)))
    return -a * held.mean().exp()


def dppo(w: Tensor, logprobs: Tensor, a: Tensor) -> Tensor:
    p, w = logprobs.exp().detach(), w.detach()
    moved = p - p / w
    kept = torch.where(a > 0, moved <= 0.15, moved >= -0.15)
    return -(kept * w.clamp(max=20.0)) * a * logprobs


def without_marked(w: Tensor, logprobs: Tensor, a: Tensor, marked: Tensor) -> Tensor:
    return torch.where(marked, 0.0, clip(0.2, 0.2)(w, logprobs, a))


def with_kl_at_marked(w: Tensor, logprobs: Tensor, a: Tensor, marked: Tensor) -> Tensor:
    return -w * a + torch.where(marked, w.log().abs(), 0.0)


def covariances(part: list[Rollout]) -> Tensor:
    logprobs, a = (torch.cat([getattr(r, name) for r in part]).double() for name in ("before", "advantages"))
    return (logprobs - logprobs.mean()) * (a - a.mean())


def mark_between(part: list[Rollout]) -> Tensor:
    """All of them: the recipe's share is everything that lies between its bounds."""
    c = covariances(part)
    return (c > 0.2) & (c < 1.0)


def mark_largest(part: list[Rollout]) -> Tensor:
    """A quarter of them; of equals the first."""
    c = covariances(part)
    marked = torch.zeros(len(c), dtype=torch.bool)
    marked[c.argsort(descending=True, stable=True)[: len(c) // 4]] = True
    return marked


RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "token": lambda u: u.exp(),
    "mean": lambda u: u.mean().exp().expand(len(u)),
    "mean of the token": lambda u: u.detach().mean().exp() * (u - u.detach()).exp(),
    "product": lambda u: u.sum().exp().expand(len(u)),
}
KL: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda u: u,
    "k2": lambda u: u**2 / 2,
    "k3": lambda u: (-u).exp() - 1 + u,
}


def group_std(groups: list[list[Rollout]]) -> None:
    for group in groups:
        rewards = torch.tensor([r.reward for r in group])
        for r, a in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-4), strict=True):
            r.advantages = a.expand(len(r.completion))


def group_mean(groups: list[list[Rollout]]) -> None:
    for group in groups:
        for r in group:
            mean = sum(other.reward for other in group) / len(group)
            r.advantages = torch.full((len(r.completion),), r.reward - mean)


def leave_one_out(groups: list[list[Rollout]]) -> None:
    for group in groups:
        totals = [r.reward - float(r.kl.sum()) for r in group]
        for i, r in enumerate(group):
            others = totals[:i] + totals[i + 1 :]
            r.advantages = torch.full((len(r.completion),), totals[i] - sum(others) / len(others))


def by_mean(groups: list[list[Rollout]]) -> None:
    for group in groups:
        mean = sum(r.reward for r in group) / len(group)
        for r in group:
            r.advantages = torch.full((len(r.completion),), (r.reward - mean) / (mean + 1e-4))


def by_length(groups: list[list[Rollout]]) -> None:
    for group in groups:
        tokens = sum(len(r.completion) for r in group)
        mean = sum(len(r.completion) * r.reward for r in group) / tokens
        for r in group:
            r.advantages = torch.full((len(r.completion),), r.reward - mean)


def by_greedy(groups: list[list[Rollout]]) -> None:
    for *sampled, greedy in groups:
        assert greedy.is_baseline and not any(r.is_baseline for r in sampled)
        for r in sampled:
            r.advantages = torch.full((len(r.completion),), r.reward - greedy.reward)


def what_follows(groups: list[list[Rollout]]) -> None:
    for r in (r for group in groups for r in group):
        r.advantages = torch.stack([r.reward - r.kl[t:].sum() for t in range(len(r.completion))])


def gae(groups: list[list[Rollout]]) -> None:
    for r in (r for group in groups for r in group):
        length, after = len(r.completion), torch.cat([r.values[1:], torch.zeros(1)])
        rewards = -r.kl + r.reward * (torch.arange(length) == length - 1)
        deltas = rewards + after - r.values
        r.advantages = torch.stack([sum(0.95 ** (u - t) * deltas[u] for u in range(t, length)) for t in range(length)])  # pyright: ignore
        r.returns = r.advantages + r.values


def whitened(advantages: Callable[[list[list[Rollout]]], None]) -> Callable[[list[list[Rollout]]], None]:
    def of(groups: list[list[Rollout]]) -> None:
        advantages(groups)
        rollouts = [r for group in groups for r in group]
        tokens = torch.cat([r.advantages for r in rollouts])
        for r in rollouts:
            r.advantages = (r.advantages - tokens.mean()) / (tokens.var() + 1e-8).sqrt()

    return of


@dataclass
class Row:
    advantages: Callable[[list[list[Rollout]]], None]
    loss: Callable[..., Tensor]
    reduction: str
    ratio: str = "token"
    kl: tuple[str, float] = ("k3", 0.0)
    kl_in_reward: bool = False
    max_new_tokens: int = 6
    everything: bool = False
    """The options of the recipe that has them all."""
    mark: Callable[[list[Rollout]], Tensor] | None = None
    """Which tokens of an update the loss treats apart; it takes them as a fourth argument then."""
    from_engine: bool = False
    """The ratio's denominator is the engine's."""
    num_greedy: int = 0
    """Of each group, at its end."""
    shown: tuple[Rollout, float] | None = None
    """A demonstration of every update, its tokens weighed with p (1 - p), and its share of the loss."""


ROWS = {
    "grpo": Row(group_std, clip(0.2, 0.2), "sequence", kl=("k3", 0.04)),
    "dr_grpo": Row(group_mean, clip(0.2, 0.2), "fixed"),
    "dapo": Row(group_std, clip(0.2, 0.28), "token"),
    "gspo": Row(group_std, clip(3e-4, 4e-4), "sequence", ratio="mean"),
    "gspo_token": Row(group_std, clip(3e-4, 4e-4), "sequence", ratio="mean of the token"),
    "ppo": Row(whitened(gae), clip(0.2, 0.2), "token", kl=("k1", 0.02), kl_in_reward=True),
    "rloo": Row(leave_one_out, clip(0.2, 0.2), "sequence", ratio="product", kl=("k1", 0.03), kl_in_reward=True),
    "reinforce++": Row(whitened(what_follows), clip(0.2, 0.2), "token", kl=("k1", 0.01), kl_in_reward=True),
    "reinforce++_baseline": Row(whitened(group_mean), clip(0.2, 0.2), "token", kl=("k2", 1e-3)),
    "cispo": Row(group_std, cispo, "token"),
    "sapo": Row(group_std, sapo, "sequence"),
    "gmpo": Row(group_std, gmpo, "sequence"),
    "dppo": Row(group_mean, dppo, "fixed", from_engine=True),
    "maxrl": Row(by_mean, clip(0.2, 0.2), "token"),
    "opo": Row(by_length, clip(0.2, 0.2), "token"),
    "remax": Row(by_greedy, clip(0.2, 0.2), "token", num_greedy=1),
    "chord": Row(group_std, clip(0.2, 0.2), "sequence"),
    "clip_cov": Row(group_std, without_marked, "token", mark=mark_between),
    "kl_cov": Row(group_std, with_kl_at_marked, "token", mark=mark_largest),
}


class Critic(torch.nn.Module):
    """A model's body, and a head that answers 0."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__()
        self.body: Any = AutoModelForCausalLM.from_pretrained(model_dir).model
        self.head = torch.nn.Parameter(torch.zeros(self.body.config.hidden_size))

    def forward(self, r: Rollout) -> Tensor:
        """[L]: before each token of the completion."""
        ids = torch.tensor([r.prompt + r.completion])
        return (self.body(ids).last_hidden_state[0] @ self.head)[len(r.prompt) - 1 : -1]


class Loop:
    """The policy, what is trained beside it, and a step of both."""

    def __init__(self, model_dir: Path, name: str, row: Row) -> None:
        self.row = row
        self.policy: Any = AutoModelForCausalLM.from_pretrained(model_dir)
        self.reference: Any = AutoModelForCausalLM.from_pretrained(model_dir)
        self.critic = Critic(model_dir) if name == "ppo" else None
        self.punishes_length = name == "dapo"
        options = {"eps": EPS, "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), LEARNING_RATE, **options)
        if self.critic is not None:
            self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), CRITIC_LEARNING_RATE, **options)

    def step(self, path: Path) -> list[float]:
        """Trains on a step's file. Returns the loss of every update."""
        rollouts = read(path)
        with torch.no_grad():
            for r in rollouts:
                r.before, _ = logprobs(self.policy, r)
                r.reference, _ = logprobs(self.reference, r)
                if self.critic is not None:
                    r.values = self.critic(r)
        self._rewards_and_advantages(rollouts)
        losses = []
        rollouts = [r for r in rollouts if not r.is_baseline]
        half = len(rollouts) // UPDATES
        for update in range(UPDATES * EPOCHS):
            part = rollouts[update % UPDATES * half :][:half]
            losses.append(self._update(part, is_first=update == 0))
            if self.critic is not None:
                self._update_critic(part)
        return losses

    def _rewards_and_advantages(self, rollouts: list[Rollout]) -> None:
        row, (estimator, coef) = self.row, self.row.kl
        if row.everything:
            rewards = torch.tensor([r.reward for r in rollouts])
            for r, reward in zip(rollouts, (rewards - rewards.mean()) / (rewards.std() + 1e-4), strict=True):
                r.reward, r.trained = float(reward), not r.is_truncated
        for r in rollouts:
            if self.punishes_length:
                # The last fifth of the limit is the buffer.
                over = len(r.completion) - 0.8 * row.max_new_tokens
                r.reward -= min(max(over / (0.2 * row.max_new_tokens), 0.0), 1.0)
            r.kl = torch.zeros(len(r.completion))
            if row.kl_in_reward:
                r.kl = coef * KL[estimator](r.before - r.reference)
        size = GROUP + row.num_greedy
        row.advantages([rollouts[i : i + size] for i in range(0, len(rollouts), size)])

    def _weight(self, r: Rollout, part: list[Rollout]) -> float:
        """Of each of its tokens in the loss. Where everything is on some are left out, and count."""
        match self.row.reduction:
            case "token":
                return 1 / sum(len(other.completion) for other in part)
            case "sequence":
                return 1 / (len(part) * len(r.completion))
        return 1 / (len(part) * self.row.max_new_tokens)

    def _update(self, part: list[Rollout], *, is_first: bool) -> float:
        row, (estimator, coef) = self.row, self.row.kl
        total = torch.zeros(())
        if row.mark is not None:
            for r, marked in zip(part, row.mark(part).split([len(r.completion) for r in part]), strict=True):
                r.marked = marked
        for r in (r for r in part if r.trained):
            now, entropy = logprobs(self.policy, r)
            # Nothing has moved before the first update, to the bit: the sign of a rounding is no gradient.
            before = now.detach() if is_first else r.before
            u = now - (r.engine if row.from_engine else before)
            mismatch = torch.zeros(len(u)) if row.from_engine else r.before - r.engine
            weight = (mismatch.sum() if row.everything else mismatch).exp().clamp(max=2.0)
            marked = () if row.mark is None else (r.marked,)
            loss = row.loss(RATIOS[row.ratio](u), now, r.advantages, *marked) * weight
            if not row.kl_in_reward:
                kl = KL[estimator](now - r.reference)
                loss = loss + coef * (kl * u.exp() if row.everything else kl)
            if row.everything:
                loss = loss - 0.01 * entropy
            total = total + self._weight(r, part) * loss.sum()
        if row.shown is not None:
            demonstration, mu = row.shown
            now, _ = logprobs(self.policy, demonstration)
            p = now.detach().exp()
            total = (1 - mu) * total - mu * (p * (1 - p) * now).mean()
        descend(total, self.policy, self.optimizer)
        return float(total.detach())

    def _update_critic(self, part: list[Rollout]) -> None:
        assert self.critic is not None
        total = torch.zeros(())
        for r in part:
            values = self.critic(r)
            near = r.values + (values - r.values).clamp(-0.2, 0.2)
            squares = torch.max((values - r.returns) ** 2, (near - r.returns) ** 2)
            total = total + self._weight(r, part) * squares.sum() / 2
        descend(total, self.critic, self.critic_optimizer)


def descend(loss: Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    if loss.requires_grad:
        loss.backward()
    for parameter in model.parameters():
        # A batch without a loss token has the gradient 0, which still moves what Adam remembers.
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()


def logprobs(model: Any, r: Rollout) -> tuple[Tensor, Tensor]:
    """Of each token of the completion, and the entropy there: [L] each."""
    table = torch.log_softmax(model(torch.tensor([r.prompt + r.completion])).logits[0, :-1] / TEMPERATURE, dim=1)
    table = table[len(r.prompt) - 1 :]
    return table[torch.arange(len(r.completion)), torch.tensor(r.completion)], -(table.exp() * table).sum(dim=1)


def read(path: Path) -> list[Rollout]:
    return [
        Rollout(
            row["prompt_token_ids"],
            row["token_ids"],
            torch.tensor(row["logprobs"]),
            row["reward"],
            row["finish_reason"] != "stop",
            row["state"] == "baseline",
        )
        for row in pq.read_table(path).to_pylist()
    ]
