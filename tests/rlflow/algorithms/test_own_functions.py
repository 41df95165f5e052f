"""Policy losses, losses of a pair and advantages of the user's own: the same numbers as ours, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlflow.algorithms.advantages import token_advantages
from rlflow.algorithms.batch import TensorBatch
from rlflow.algorithms.policy_objectives import policy_objective
from rlflow.algorithms.preference_objectives import preference_objective
from rlflow.driver import assemble
from rlflow.plugins import PluginError
from rlflow.recipe import algorithm_of
from rlflow.types import Denominators, Group, Prompt
from tests.flat_rollouts import flat

PLUGIN = """\
import numpy as np
import torch


def clip(ratio, advantages, low=0.2, high=0.2):
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def by_sequence(logprobs, old_logprobs, sequence_ids, num_sequences):
    sums = torch.zeros(num_sequences).index_add(0, sequence_ids, logprobs - old_logprobs.detach())
    return sums[sequence_ids]


def sigmoid(chosen, rejected, beta):
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


def best_of_group(rewards, group_of, scale=1.0):
    best = {group: np.nanmax(rewards[group_of == group]) for group in set(group_of)}
    return [scale * float(reward == best[group]) for reward, group in zip(rewards, group_of)]


def rising(rewards, lengths):
    return [reward * np.arange(1, length + 1) for reward, length in zip(rewards, lengths)]


def by_difficulty(rewards, group_of, columns):
    means = {group: np.nanmean(rewards[group_of == group]) for group in set(group_of)}
    return [
        of_row["difficulty"] * (reward - means[group]) for reward, group, of_row in zip(rewards, group_of, columns)
    ]


def constant(ratio):
    return torch.ones_like(ratio)


def mean(ratio):
    return ratio.mean()


def number(ratio):
    return 3


def wanting(ratio, colour):
    return ratio


def three(rewards):
    return [1.0, 2.0, 3.0]


def infinite(rewards):
    return rewards / 0.0
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return str(path)


def batch(**fields: Any) -> TensorBatch:
    """Two sequences of two and three tokens, of which the first is not trained."""
    mask = torch.tensor([False, True, False, True, True])
    return TensorBatch(
        token_ids=torch.arange(5),
        position_ids=torch.tensor([0, 1, 0, 1, 2]),
        loss_mask=mask,
        loss_weights=mask / 3,
        sequence_ids=torch.tensor([0, 0, 1, 1, 1]),
        **{"labels": torch.tensor([1.0, -1.0]), **fields},
    )


ADVANTAGES = torch.tensor([0.0, 1.0, 0.0, -1.0, 2.0])
OLD = torch.tensor([0.0, -1.0, 0.0, -2.0, -1.5])
NEW = torch.tensor([0.0, -0.5, 0.0, -2.1, -2.5])


def objective(loss: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of three tokens, and its gradient."""
    algorithm = algorithm_of("grpo", loss=loss, kl={"coef": 0.0}, correction={"mode": "none"})
    logprobs = NEW.clone().requires_grad_()
    total, _ = policy_objective(
        logprobs, None, batch(advantages=ADVANTAGES, proximal_logprobs=OLD), algorithm, Denominators(3, 2, 1)
    )
    total.backward()
    assert logprobs.grad is not None
    return total.detach(), logprobs.grad


def test_a_clip_of_ones_own_is_the_clip(plugin):
    given = {"kind": f"{plugin}:clip", "args": {"low": 0.3, "high": 0.1}}
    expected = objective({"kind": "clip", "clip_low": 0.3, "clip_high": 0.1})
    assert all(map(torch.equal, objective(given), expected))
    by_hand = -(1.1 * 1 + np.exp(-0.1) * -1 + np.exp(-1.0) * 2) / 3
    assert expected[0].item() == pytest.approx(by_hand)


def test_a_loss_may_look_at_whole_sequences(plugin):
    total, gradient = objective({"kind": f"{plugin}:by_sequence"})
    # 0.5 for the first sequence's token, -0.1 - 1.0 for each of the second's two.
    assert total.item() == pytest.approx((0.5 + 2 * -1.1) / 3)
    assert gradient.tolist() == pytest.approx([0, 1 / 3, 0, 2 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("constant", "returned a loss without a gradient"),
        ("mean", r"returned a tensor of shape \[\]: return a loss for each token, \[3\]"),
        ("number", r"returned a int: return a loss for each token, a tensor of shape \[3\]"),
        ("wanting", "raised TypeError: .*missing 1 required positional argument: 'colour'"),
    ],
)
def test_a_loss_that_is_none_is_refused_by_name(plugin, name, message):
    with pytest.raises(PluginError, match=rf"mine\.py:{name} {message}"):
        objective({"kind": f"{plugin}:{name}"})


def test_a_pair_loss_of_ones_own_is_dpos(plugin):
    found = []
    for loss in (f"{plugin}:sigmoid", "sigmoid"):
        algorithm = algorithm_of("dpo", preference={"loss": loss, "beta": 0.5})
        logprobs = NEW.clone().requires_grad_()
        total, metrics = preference_objective(logprobs, None, batch(ref_logprobs=OLD), algorithm, Denominators(3, 2, 1))
        total.backward()
        found.append((total.item(), logprobs.grad, metrics["preference/margin"].value))
    assert found[0][0] == pytest.approx(found[1][0])
    # The chosen answer's log-ratio is 0.5, the rejected one's -1.1.
    assert found[0][0] == pytest.approx(np.log1p(np.exp(-0.5 * 1.6)))
    assert torch.allclose(found[0][1], found[1][1]) and found[0][2] == found[1][2]


REWARDS, GROUPS = np.array([1.0, 3.0, np.nan, 2.0]), np.array([0, 0, 1, 1])
NO_PENALTIES = [np.zeros(n) for n in (2, 1, 3, 2)]


def advantages(block: dict[str, Any], penalties: list[np.ndarray] = NO_PENALTIES) -> list[list[float]]:
    algorithm = algorithm_of("grpo", advantage=block)
    found, _ = token_advantages(REWARDS, GROUPS, penalties, algorithm.advantage)
    return [of_rollout.tolist() for of_rollout in found]


def test_an_advantage_of_ones_own_is_a_number_a_rollout_or_one_a_token(plugin):
    best = {"estimator": f"{plugin}:best_of_group", "args": {"scale": 2.0}}
    assert advantages(best) == [[0.0, 0.0], [2.0], [0.0, 0.0, 0.0], [2.0, 2.0]]
    assert advantages({"estimator": f"{plugin}:rising"}) == [[1.0, 2.0], [3.0], [0.0, 0.0, 0.0], [2.0, 4.0]]


def test_it_sees_the_columns_of_each_rollouts_row_through_the_driver(plugin):
    block = algorithm_of("grpo", advantage={"estimator": f"{plugin}:by_difficulty"})
    prompt = np.array([5, 6], dtype=np.int32)

    def group(difficulty: float, *rewards: float) -> Group:
        row = Prompt("p", prompt, [], {"difficulty": difficulty})
        return Group(row, 0, tuple(flat(prompt, [7], reward, finish_reason="stop") for reward in rewards))

    batch = assemble.assemble([group(1.0, 2.0, 0.0), group(3.0, 1.0, 0.0, 2.0)], block, 4)
    samples = assemble.with_advantages(batch, batch.samples, block)
    assert [float(sample.advantages[-1]) for sample in samples] == [1.0, -1.0, 0.0, -3.0, 3.0]


def test_it_sees_rewards_less_their_penalties_and_is_whitened_where_the_recipe_says_so(plugin):
    penalties = [np.full(n, 0.5) for n in (2, 1, 3, 2)]
    assert advantages({"estimator": f"{plugin}:rising"}, penalties) == [[0.0, 0.0], [2.5], [0.0] * 3, [1.0, 2.0]]
    whitened = advantages({"estimator": f"{plugin}:rising", "whiten": True}, penalties)
    scored = np.concatenate([whitened[row] for row in (0, 1, 3)])
    assert scored.mean() == pytest.approx(0) and scored.std(ddof=1) == pytest.approx(1)
    assert whitened[2] == [0.0] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three", "returned a list of 3: return a number for each of the 4 rollouts"),
        ("infinite", "returned an advantage that is not finite, for a rollout that has a reward"),
    ],
)
def test_advantages_that_are_none_are_refused_by_name(plugin, name, message):
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(PluginError, match=message):
        advantages({"estimator": f"{plugin}:{name}"})
