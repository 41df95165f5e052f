"""torchrl, PyTorch's RL library, as oracle of PPO and REINFORCE++: advantages, returns, clips, whitening.

`make oracles` installs it (requirements/oracles.txt); elsewhere these tests are skipped.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("torchrl", reason="torchrl is missing: make oracles installs it")

from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import generalized_advantage_estimate, reward2go
from trl_models import assert_same_loss_and_gradient, tensor_batch

from rlflow.algorithms.advantages import gae, token_advantages, whiten
from rlflow.algorithms.policy_objectives import policy_objective, value_objective
from rlflow.recipe import algorithm_of
from rlflow.recipe.advantage_blocks import GAEBlock, ReturnBlock
from rlflow.types import Denominators

GAMMAS_AND_LAMBDAS = [(1.0, 0.95), (1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.5, 0.7)]
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-6)])


def same(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def episodes(*arrays):
    """[..., T] -> tensors [..., T, 1] that end after the last step."""
    tensors = [torch.as_tensor(array).unsqueeze(-1) for array in arrays]
    done = torch.zeros_like(tensors[0], dtype=torch.bool)
    done[..., -1, :] = True
    return [*tensors, done]


def torchrls_gae(rewards, values, gamma, lam):
    # What follows the last step is not 0 here: that the episode has ended is what keeps it out.
    following = np.concatenate([values[..., 1:], np.full_like(values[..., :1], 7.0)], axis=-1)
    rewards, values, following, done = episodes(rewards, values, following)
    # As plain numbers they would be rounded to float32, whatever the rewards are.
    gamma, lam = torch.tensor(gamma, dtype=values.dtype), torch.tensor(lam, dtype=values.dtype)
    both = generalized_advantage_estimate(gamma, lam, values, following, rewards, done, done.clone())
    return [x.squeeze(-1).numpy() for x in both]


@PRECISIONS
@pytest.mark.parametrize(("gamma", "lam"), GAMMAS_AND_LAMBDAS)
def test_gae_agrees_with_torchrl(gamma, lam, dtype, tolerance):
    rewards, values = np.random.default_rng(0).normal(size=(2, 4, 12)).astype(dtype)
    both = zip(gae(rewards, values, gamma, lam), torchrls_gae(rewards, values, gamma, lam), strict=True)
    for actual, expected in both:
        assert expected.dtype == dtype
        same(actual, expected, tolerance)


REWARDS = np.array([1.0, -0.5, np.nan, 2.0, 0.25, -3.0])
GROUP_OF = np.array([0, 0, 0, 1, 1, 1])
LENGTHS = [4, 1, 3, 9, 2, 6]


def rollouts():
    """Penalties, values, and the rewards of tokens, a row a completion."""
    random = np.random.default_rng(1)
    penalties = [0.1 * random.normal(size=n) for n in LENGTHS]
    values = [random.normal(size=n) for n in LENGTHS]
    token_rewards = [
        np.append(np.zeros(n - 1), reward) - p for n, reward, p in zip(LENGTHS, REWARDS, penalties, strict=True)
    ]
    return penalties, values, token_rewards


@pytest.mark.parametrize(("gamma", "lam"), GAMMAS_AND_LAMBDAS)
def test_ppos_advantages_of_a_batch_agree_with_torchrls_of_each_completion(gamma, lam):
    penalties, values, token_rewards = rollouts()
    block = GAEBlock(gamma=gamma, gae_lambda=lam)
    advantages, returns = token_advantages(REWARDS, GROUP_OF, penalties, block, values)
    for row in np.flatnonzero(~np.isnan(REWARDS)):
        expected = torchrls_gae(token_rewards[row], values[row], gamma, lam)
        same(advantages[row], expected[0], 1e-10)
        same(returns[row], expected[1], 1e-10)


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.9, 0.5])
def test_reinforce_plus_plus_agrees_with_torchrls_discounted_rewards_to_go(gamma):
    penalties, _, token_rewards = rollouts()
    advantages, _ = token_advantages(REWARDS, GROUP_OF, penalties, ReturnBlock(gamma=gamma))
    for row in np.flatnonzero(~np.isnan(REWARDS)):
        rewards, done = episodes(token_rewards[row])
        same(advantages[row], reward2go(rewards, done, gamma).flatten(), 1e-10)


TOKENS, WORDS = 40, 5
LOW_AND_HIGH = [(0.2, 0.2), (0.2, 0.28)]


class Tokens:
    """Logits and values of tokens, each its own parameter, in torchrl's modules; and a batch of both."""

    def __init__(self, dtype: torch.dtype):
        torch.manual_seed(0)
        self.actor = torch.nn.Embedding(TOKENS, WORDS, dtype=dtype)
        self.critic = torch.nn.Embedding(TOKENS, 1, dtype=dtype)
        self.words = torch.randint(0, WORDS, (TOKENS,))
        # Far enough from the current ones that both clips hold somewhere.
        self.old_logprobs = self.logprobs.detach() + 0.4 * torch.randn(TOKENS, dtype=dtype)
        self.old_values = self.values.detach() + 0.4 * torch.randn(TOKENS, dtype=dtype)
        self.advantages, self.returns = torch.randn(2, TOKENS, dtype=dtype)

    @property
    def table(self) -> torch.Tensor:
        return torch.log_softmax(self.actor.weight, dim=1)

    @property
    def logprobs(self) -> torch.Tensor:
        return self.table[torch.arange(TOKENS), self.words]

    @property
    def values(self) -> torch.Tensor:
        return self.critic.weight[:, 0]

    def torchrls(self, **options) -> TensorDict:
        actor = ProbabilisticTensorDictSequential(
            TensorDictModule(self.actor, in_keys=["token"], out_keys=["logits"]),
            ProbabilisticTensorDictModule(
                in_keys=["logits"],
                out_keys=["action"],
                distribution_class=torch.distributions.Categorical,
                return_log_prob=True,
            ),
        )
        critic = TensorDictModule(self.critic, in_keys=["token"], out_keys=["state_value"])
        loss = ClipPPOLoss(actor, critic, functional=False, loss_critic_type="l2", critic_coeff=0.5, **options)
        batch = {
            "token": torch.arange(TOKENS),
            "action": self.words,
            "action_log_prob": self.old_logprobs,
            "state_value": self.old_values[:, None],
            "advantage": self.advantages[:, None],
            "value_target": self.returns[:, None],
        }
        return loss(TensorDict(batch, batch_size=[TOKENS]))

    def ours(self, objective, block, advantages=None):
        entropies = -(self.table.exp() * self.table).sum(1)
        batch = tensor_batch(
            torch.ones(1, TOKENS),
            torch.full((1,), 1.0 / TOKENS, dtype=self.returns.dtype),
            old_logprobs=self.old_logprobs,
            old_values=self.old_values,
            returns=self.returns,
            advantages=self.advantages if advantages is None else advantages,
        )
        given = self.logprobs if objective is policy_objective else self.values
        return objective(given, entropies, batch, block, Denominators(TOKENS, 1, 1))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def tokens(request):
    return Tokens(request.param)


@pytest.mark.parametrize(("low", "high"), LOW_AND_HIGH)
def test_ppos_clipped_loss_and_its_entropy_bonus_agree_with_torchrl(tokens, low, high):
    block = algorithm_of("ppo", loss={"clip_low": low, "clip_high": high, "entropy_coef": 0.03}, kl={"coef": 0.0})
    actual, metrics = tokens.ours(policy_objective, block)
    theirs = tokens.torchrls(clip_epsilon=(low, high), entropy_bonus=True, entropy_coeff=0.03)
    assert metrics["clip/low_fraction"].value > 0 and metrics["clip/high_fraction"].value > 0
    assert_same_loss_and_gradient(actual, theirs["loss_objective"] + theirs["loss_entropy"], tokens.actor)


def test_whitening_agrees_with_torchrls(tokens):
    (whitened,) = whiten([tokens.advantages.numpy()])
    actual, _ = tokens.ours(
        policy_objective, algorithm_of("ppo", kl={"coef": 0.0}), torch.as_tensor(whitened).to(tokens.returns)
    )
    theirs = tokens.torchrls(clip_epsilon=0.2, entropy_bonus=False, normalize_advantage=True)
    assert_same_loss_and_gradient(actual, theirs["loss_objective"], tokens.actor)


@pytest.mark.parametrize("clip", [None, 0.2, 0.5])
def test_the_critics_loss_agrees_with_torchrl(tokens, clip):
    # Theirs is the squared error; critic_coeff 1/2 makes it ours.
    actual, metrics = tokens.ours(value_objective, algorithm_of("ppo", critic={"clip": clip}))
    theirs = tokens.torchrls(entropy_bonus=False, clip_value=clip)
    assert (metrics["value/clip_fraction"].value > 0) == (clip is not None)
    assert_same_loss_and_gradient(actual, theirs["loss_critic"], tokens.critic)
    if clip is not None:
        assert float(metrics["value/clip_fraction"].value) == pytest.approx(float(theirs["value_clip_fraction"]))
