"""TRL's trainers on a tiny random model, as oracles of the preference, reward and supervised losses.

Where TRL means something else by a name, the test says what and turns our option to it.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl_models import (
    CPU,
    assert_same_loss_and_gradient,
    causal_model,
    logprobs,
    reward_model,
    tensor_batch,
    tokenizer,
)

from rlflow.algorithms import preference_losses
from rlflow.algorithms.objectives import sft_objective
from rlflow.algorithms.preference_objectives import kto_objective, preference_objective, reward_model_objective
from rlflow.algorithms.preference_targets import aot_margins, aot_partners, kto_kl
from rlflow.algorithms.reductions import preference_weights
from rlflow.recipe import algorithm_of
from rlflow.types import Denominators

PAIRS = [
    {"prompt": "w1 w2 ", "chosen": "w3 w4 w5 w6", "rejected": "w7 w8"},
    {"prompt": "w9 ", "chosen": "w3 w1", "rejected": "w7 w8 w2 w2 w3"},
    {"prompt": "w9 w8 w4 ", "chosen": "w3 w1 w1", "rejected": "w8 w2 w2 w3"},
    {"prompt": "w11 w12 ", "chosen": "w20 w13 w14", "rejected": "w15 w16"},
]


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    args = DPOConfig(output_dir=str(tmp_path_factory.mktemp("dpo")), per_device_train_batch_size=len(PAIRS), **CPU)
    trainer = DPOTrainer(
        model=causal_model(0),
        ref_model=causal_model(1),
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
    )
    return trainer, first_batch(trainer)


def our_dpo_loss(trainer, batch, **preference):
    ids, attention, mask = (adjacent(batch[k]) for k in ("input_ids", "attention_mask", "completion_mask"))
    ours, _ = logprobs(trainer.model, ids, attention)
    with torch.no_grad():
        ref, _ = logprobs(trainer.ref_model, ids, attention)
    labels = torch.tensor([1.0, -1.0]).repeat(len(ids) // 2)
    counts = mask.sum(1).numpy()
    weights, denominators = preference_weights("token", counts, labels.numpy(), 1)
    sums = [(x.detach() * mask.flatten()).reshape(mask.shape).sum(1).numpy() for x in (ours, ref)]
    targets = targets_by_rank(preference["loss"], *sums)
    tensors = tensor_batch(mask, torch.tensor(weights, dtype=torch.float32), labels=labels, ref_logprobs=ref, **targets)
    return preference_objective(ours, None, tensors, algorithm_of("dpo", preference=preference), denominators)[0]


def targets_by_rank(loss: str, scores: np.ndarray, references: np.ndarray) -> dict[str, torch.Tensor]:
    """What the driver computes of the whole batch."""
    if loss == "aot":
        margins = aot_margins(scores[0::2] - scores[1::2], references[0::2] - references[1::2])
        assert margins.any(), "the test needs a reference of another order"
        return {"rank_margins": torch.tensor(margins).repeat_interleave(2)}
    if loss == "aot_unpaired":
        ratios = scores - references
        rejected, chosen = aot_partners(ratios[0::2], ratios[1::2])
        assert (rejected != ratios[1::2]).any(), "the test needs pairs of unequal ranks"
        return {"rank_partners": torch.tensor(np.stack([rejected, chosen], axis=1).ravel())}
    return {}


def adjacent(stacked: torch.Tensor) -> torch.Tensor:
    """[chosen..., rejected...] -> chosen, rejected, chosen, ..."""
    return torch.stack(stacked.chunk(2), dim=1).flatten(0, 1)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("theirs", "ours", "label_smoothing"),
    [
        ("sigmoid", {"loss": "sigmoid"}, 0.0),
        ("sigmoid_norm", {"loss": "sigmoid", "length_normalized": True}, 0.0),
        ("hinge", {"loss": "hinge"}, 0.0),
        # TRL's ipo is of means over tokens, as its authors ran it; the paper's eq. 17, our default, is of sums.
        ("ipo", {"loss": "ipo", "length_normalized": True}, 0.0),
        ("exo_pair", {"loss": "exo_pair"}, 1e-3),
        ("nca_pair", {"loss": "nca_pair"}, 0.0),
        ("robust", {"loss": "robust"}, 0.1),
        ("bco_pair", {"loss": "bco_pair"}, 0.0),
        ("sppo_hard", {"loss": "sppo"}, 0.0),
        ("aot", {"loss": "aot"}, 0.0),
        ("aot", {"loss": "aot"}, 0.1),
        ("aot_unpaired", {"loss": "aot_unpaired"}, 0.0),
        ("aot_unpaired", {"loss": "aot_unpaired"}, 0.1),
        ("apo_zero", {"loss": "apo_zero"}, 0.0),
        ("apo_down", {"loss": "apo_down"}, 0.0),
        ("discopop", {"loss": "discopop"}, 0.0),
    ],
)
def test_dpo_losses_agree_with_trl(dpo, theirs, ours, label_smoothing, beta):
    trainer, batch = dpo
    trainer.loss_types, trainer.loss_weights = [theirs], [1.0]
    trainer.beta, trainer.label_smoothing = beta, label_smoothing
    expected = trainer.compute_loss(trainer.model, batch)
    smoothing = {"label_smoothing": label_smoothing} if label_smoothing else {}
    actual = our_dpo_loss(trainer, batch, beta=beta, **smoothing, **ours)
    assert_same_loss_and_gradient(actual, expected, trainer.model)


@pytest.mark.parametrize(("theirs", "ours"), [("forward_kl", "forward_kl"), ("js_divergence", "js")])
@pytest.mark.parametrize(
    ("loss", "fields", "label_smoothing"),
    [
        ("sigmoid", {}, 0.0),
        ("sigmoid_norm", {"length_normalized": True}, 0.0),
        ("hinge", {}, 0.0),
        ("ipo", {"length_normalized": True}, 0.0),
        ("exo_pair", {"label_smoothing": 1e-3}, 1e-3),
        ("robust", {"label_smoothing": 0.1}, 0.1),
        ("discopop", {}, 0.0),
    ],
)
def test_dpo_with_another_divergence_agrees_with_trl(dpo, monkeypatch, theirs, ours, loss, fields, label_smoothing):
    trainer, batch = dpo
    monkeypatch.setattr(trainer, "f_divergence_type", theirs)
    trainer.loss_types, trainer.loss_weights = [loss], [1.0]
    trainer.beta, trainer.label_smoothing = 0.7, label_smoothing
    expected = trainer.compute_loss(trainer.model, batch)
    name = loss.removesuffix("_norm")
    actual = our_dpo_loss(trainer, batch, loss=name, beta=0.7, divergence=ours, **fields)
    assert_same_loss_and_gradient(actual, expected, trainer.model)


def test_dpo_with_a_likelihood_term_agrees_with_trl(dpo):
    trainer, batch = dpo
    trainer.loss_types, trainer.loss_weights = ["sigmoid", "sft"], [1.0, 0.3]
    trainer.beta, trainer.label_smoothing = 0.1, 0.0
    expected = trainer.compute_loss(trainer.model, batch)
    actual = our_dpo_loss(trainer, batch, loss="sigmoid", beta=0.1, sft_coef=0.3)
    assert_same_loss_and_gradient(actual, expected, trainer.model)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.75)])
def test_kto_agrees_with_trl(tmp_path, weights):
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(PAIRS, ("chosen", "rejected", "chosen", "chosen"), strict=True)
    ]
    args = KTOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows),
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        **CPU,
    )
    trainer = KTOTrainer(
        model=causal_model(1),
        ref_model=causal_model(0),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = first_batch(trainer)
    expected = trainer.compute_loss(trainer.model, batch)

    def sums(model, prefix):
        taken, _ = logprobs(model, batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"])
        return (taken * batch[f"{prefix}completion_mask"].flatten()).reshape(len(rows), -1).sum(1).detach().numpy()

    kl = kto_kl(sums(trainer.model, "KL_"), sums(trainer.ref_model, "KL_"))
    ours, _ = logprobs(trainer.model, batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        ref, _ = logprobs(trainer.ref_model, batch["input_ids"], batch["attention_mask"])
    labels = torch.where(torch.as_tensor(batch["label"]).bool(), 1.0, -1.0)
    tensors = tensor_batch(
        batch["completion_mask"], labels=labels, batch_kls=torch.full((len(rows),), kl), ref_logprobs=ref
    )
    block = algorithm_of(
        "kto", preference={"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    )
    actual, metrics = kto_objective(ours, None, tensors, block, Denominators(0, len(rows), len(rows)))
    assert kl > 0, "the test needs a reference point that matters"
    assert float(metrics["kto/kl"].value) == pytest.approx(kl)
    assert_same_loss_and_gradient(actual, expected, trainer.model)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.75)])
def test_apo_zero_of_answers_without_a_partner_agrees_with_trl(tmp_path, weights):
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(PAIRS, ("chosen", "rejected", "chosen", "chosen"), strict=True)
    ]
    numbers = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    args = KTOConfig(
        output_dir=str(tmp_path),
        loss_type="apo_zero_unpaired",
        per_device_train_batch_size=len(rows),
        **numbers,
        **CPU,
    )
    trainer = KTOTrainer(
        model=causal_model(1),
        ref_model=causal_model(0),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    batch = first_batch(trainer)
    expected = trainer.compute_loss(trainer.model, batch)
    ours, _ = logprobs(trainer.model, batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        ref, _ = logprobs(trainer.ref_model, batch["input_ids"], batch["attention_mask"])
    labels = torch.where(torch.as_tensor(batch["label"]).bool(), 1.0, -1.0)
    zeros = torch.zeros(len(rows))
    tensors = tensor_batch(batch["completion_mask"], labels=labels, batch_kls=zeros, ref_logprobs=ref)
    block = algorithm_of("apo_zero_unpaired", preference=numbers)
    actual, _ = kto_objective(ours, None, tensors, block, Denominators(0, len(rows), len(rows)))
    assert_same_loss_and_gradient(actual, expected, trainer.model)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("margins", [None, [0.5, 1.0, 0.0, 2.0]])
def test_reward_modelling_agrees_with_trl(tmp_path, center, margins):
    rows = [pair | ({} if margins is None else {"margin": margins[i]}) for i, pair in enumerate(PAIRS)]
    args = RewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(rows), center_rewards_coefficient=center, **CPU
    )
    trainer = RewardTrainer(
        model=reward_model(0), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    batch = first_batch(trainer)
    expected = trainer.compute_loss(trainer.model, dict(batch))
    scores = trainer.model(
        input_ids=adjacent(batch["input_ids"]), attention_mask=adjacent(batch["attention_mask"])
    ).logits.squeeze(-1)
    given = torch.zeros(len(rows)) if margins is None else batch["margin"]
    tensors = tensor_batch(
        adjacent(batch["attention_mask"]),
        labels=torch.tensor([1.0, -1.0]).repeat(len(rows)),
        reward_margins=given.repeat_interleave(2),
    )
    block = algorithm_of("reward_model", preference={"center_coef": center or 0.0})
    actual, _ = reward_model_objective(scores, None, tensors, block, Denominators(0, 2 * len(rows), len(rows)))
    assert_same_loss_and_gradient(actual, expected, trainer.model)


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_cross_entropy_agrees_with_trl_on_completions_and_on_plain_text(tmp_path, name):
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    if name == "pretrain":
        rows = [{"text": row["prompt"] + row["completion"]} for row in rows]
    args = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=len(rows), max_length=None, **CPU)
    trainer = SFTTrainer(
        model=causal_model(0), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )
    batch = first_batch(trainer)
    expected = trainer.compute_loss(trainer.model, dict(batch))
    mask = batch["labels"] != -100
    # Nothing precedes the first token.
    mask[:, 0] = False
    attention = batch["input_ids"].ne(0).long() if "attention_mask" not in batch else batch["attention_mask"]
    ours, _ = logprobs(trainer.model, batch["input_ids"], attention)
    num_tokens = int(mask.sum())
    tensors = tensor_batch(mask, torch.full((len(rows),), 1.0 / num_tokens))
    denominators = Denominators(num_tokens, len(rows), len(rows))
    actual, _ = sft_objective(ours, None, tensors, algorithm_of(name), denominators)
    assert_same_loss_and_gradient(actual, expected, trainer.model)


CHOSEN = torch.tensor([-3.0, -7.5, -0.4, -12.0])
REJECTED = torch.tensor([-4.0, -6.0, -0.9, -30.0])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [None, 0.5])
def test_cpo_and_simpo_agree_with_trl(gamma, label_smoothing):
    fake = SimpleNamespace(
        alpha=0.0,
        beta=0.7,
        label_smoothing=label_smoothing,
        loss_type="sigmoid" if gamma is None else "simpo",
        simpo_gamma=gamma,
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected, _, _ = CPOTrainer.cpo_loss(fake, CHOSEN, REJECTED)
    actual = preference_losses.sigmoid(CHOSEN, REJECTED, 0.7, label_smoothing, gamma or 0.0)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_orpo_agrees_with_trl():
    fake = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    expected = ORPOTrainer.odds_ratio_loss(fake, CHOSEN, REJECTED)[0]
    # Theirs is the gain, ours the loss.
    torch.testing.assert_close(preference_losses.orpo(CHOSEN, REJECTED, 0.1), -expected, rtol=1e-6, atol=1e-6)
    assert np.isfinite(expected.numpy()).all()
