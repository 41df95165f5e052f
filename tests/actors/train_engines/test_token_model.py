from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from rlflow.actors.train_engines import chosen_logprobs, token_model
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.token_model import load_token_model
from rlflow.recipe import ModelBlock

LENGTHS = [5, 9, 2, 13]
CU_SEQLENS = np.concatenate([[0], np.cumsum(LENGTHS)])


@pytest.fixture(scope="module")
def pair(tiny_model_dir):
    """Ours and transformers' own, of the same weights."""
    ours = load_token_model(ModelBlock(path=str(tiny_model_dir)), seed=0, device=torch.device("cpu"))
    return ours, AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def tokens_of(model) -> torch.Tensor:
    return torch.randint(0, model.model.config.vocab_size, (int(CU_SEQLENS[-1]),), generator=torch.manual_seed(1))


def outputs(model, tokens, wanted, temperature=1.0, entropies="values"):
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    layout = PackedLayout(CU_SEQLENS, torch.device("cpu"))
    return model(tokens, positions, layout, wanted, temperature, entropies)


def expected(theirs, tokens, temperature):
    """Each sequence through transformers alone: logprobs and entropies, 0 at first tokens."""
    logprobs, entropies = torch.zeros(len(tokens)), torch.zeros(len(tokens))
    for start, end in pairwise(CU_SEQLENS):
        logits = theirs(tokens[None, start:end]).logits[0, :-1] / temperature
        full = torch.log_softmax(logits, dim=-1)
        logprobs[start + 1 : end] = full.gather(1, tokens[start + 1 : end, None]).squeeze(1)
        entropies[start + 1 : end] = -(full.exp() * full).sum(-1)
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_and_entropies_equal_transformers_sequence_by_sequence(pair, temperature):
    ours, theirs = pair
    tokens = tokens_of(ours)
    wanted = torch.cat([torch.arange(n) for n in LENGTHS]) > 0
    with torch.no_grad():
        got = outputs(ours, tokens, wanted, temperature)
        logprobs, entropies = expected(theirs, tokens, temperature)
    torch.testing.assert_close(got.logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.entropies, entropies, atol=1e-5, rtol=0)


def test_the_gradient_of_packed_sequences_is_that_of_transformers_padded_batch(pair):
    ours, theirs = pair
    tokens = tokens_of(ours)
    weights = torch.linspace(-1, 1, len(tokens))
    wanted = torch.cat([torch.arange(n) for n in LENGTHS]) > 0
    packed = (outputs(ours, tokens, wanted, entropies="none").logprobs * weights).sum()
    ids, mask = torch.zeros((2, len(LENGTHS), max(LENGTHS)), dtype=torch.long)
    for row, (start, end) in enumerate(pairwise(CU_SEQLENS)):
        ids[row, : end - start], mask[row, : end - start] = tokens[start:end], 1
    logits = theirs(input_ids=ids, attention_mask=mask).logits[:, :-1]
    taken = torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    padded = (taken[mask[:, 1:] == 1] * weights[wanted]).sum()
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    one, other = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])
        for loss, model in ((packed, ours), (padded, theirs))
    )
    assert (one - other).norm() < 1e-6 * other.norm()


def test_ids_that_are_left_out_change_logprobs_entropies_and_gradients_as_their_absence_does(pair):
    """Beside transformers' logits without their columns."""
    ours, theirs = pair
    kept = torch.arange(theirs.config.vocab_size)[3:-9]
    tokens = torch.randint(3, 3 + len(kept), (9,), generator=torch.manual_seed(1))
    positions, weights = torch.arange(9), torch.linspace(-1, 1, 9)
    ours.leave_out(np.concatenate([np.arange(3), np.arange(theirs.config.vocab_size)[-9:]]))
    layout = PackedLayout(np.array([0, 9]), torch.device("cpu"))
    got = ours(tokens, positions, layout, positions > 0, 0.7, "gradient")
    ours.left_out = None
    full = torch.log_softmax(theirs(tokens[None]).logits[0, :-1, kept] / 0.7, dim=-1)
    logprobs, entropies = full.gather(1, tokens[1:, None] - 3).squeeze(1), -(full.exp() * full).sum(-1)
    torch.testing.assert_close(got.logprobs[1:], logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.entropies[1:], entropies, atol=1e-5, rtol=0)
    losses = {ours: ((got.logprobs + got.entropies) * weights).sum()}
    losses[theirs] = ((logprobs + entropies) * weights[1:]).sum()
    one, other = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])
        for model, loss in losses.items()
    )
    assert (one - other).norm() < 1e-5 * other.norm()


def test_a_change_in_one_sequence_is_seen_by_no_other_of_a_whole_model(pair):
    ours, _ = pair
    tokens = tokens_of(ours)
    wanted = torch.cat([torch.arange(n) for n in LENGTHS]) > 0
    changed = torch.zeros(len(tokens), dtype=torch.bool)
    changed[CU_SEQLENS[1] : CU_SEQLENS[2]] = True
    others = torch.where(changed, (tokens + 1) % ours.model.config.vocab_size, tokens)
    with torch.no_grad():
        before, after = (outputs(ours, ids, wanted).logprobs for ids in (tokens, others))
    assert torch.equal(before[~changed], after[~changed])
    assert (before[changed & wanted] != after[changed & wanted]).all()


def test_a_checkpoint_without_a_language_models_head_is_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no LlamaForCausalLM: it lacks lm_head.weight"):
        load_token_model(ModelBlock(path=str(tmp_path)), seed=0, device=torch.device("cpu"))


def test_only_wanted_tokens_are_scored(pair):
    ours, _ = pair
    tokens = tokens_of(ours)
    wanted = torch.zeros(len(tokens), dtype=torch.bool)
    wanted[[3, 7]] = True
    got = outputs(ours, tokens, wanted)
    assert (got.logprobs != 0).nonzero().squeeze(1).tolist() == [3, 7]


def test_chunked_logits_give_the_gradient_of_whole_logits(pair, monkeypatch):
    ours, _ = pair
    tokens = tokens_of(ours)
    wanted = torch.cat([torch.arange(n) for n in LENGTHS]) > 0

    def gradients():
        got = outputs(ours, tokens, wanted, 0.9, "gradient")
        loss = (got.logprobs * torch.linspace(-1, 1, len(tokens))).sum() + 0.1 * got.entropies.sum()
        return torch.autograd.grad(loss, list(ours.parameters()))

    whole = gradients()
    monkeypatch.setattr(token_model, "_CHUNK_BYTES", 4 * 5 * ours.model.config.vocab_size)
    for one, other in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("entropies", ["none", "values", "gradient"])
def test_gradients_through_the_logits_place_are_those_of_torch(entropies, monkeypatch):
    """Beside torch's operations in float64: scaled logits, ids that are left out, blocks of two rows."""
    monkeypatch.setattr(chosen_logprobs, "_BLOCK_ELEMENTS", {"cpu": 2 * 11})
    generator = torch.manual_seed(0)
    logits = 3 * torch.randn(5, 11, generator=generator)
    targets, weights = torch.tensor([0, 10, 3, 3, 7]), torch.randn(2, 5, generator=generator)
    left_out = torch.arange(11) == 4
    own = logits.clone().requires_grad_()
    columns = chosen_logprobs.chosen_logprobs(own.clone(), targets, 0.7, left_out, entropies)
    exact = logits.double().requires_grad_()
    full = torch.log_softmax((0.7 * exact)[:, ~left_out], dim=-1)
    places = torch.cumsum(~left_out, 0)[targets] - 1
    expected = [full.gather(1, places[:, None]).squeeze(1), -(full.exp() * full).sum(-1)]
    for column, other in zip(columns, expected, strict=False):
        torch.testing.assert_close(column.double(), other, atol=1e-6, rtol=0)
    count = 2 if entropies == "gradient" else 1
    assert [column.requires_grad for column in columns] == [True, entropies == "gradient"][: len(columns)]
    for loss in (sum((w * c).sum() for w, c in zip(weights[:count], of, strict=False)) for of in (columns, expected)):
        loss.backward()
    torch.testing.assert_close(own.grad.double(), exact.grad, atol=1e-6, rtol=0)


def test_logits_whose_place_the_gradient_took_are_not_read_again():
    logits = torch.ones(1, 3, requires_grad=True)
    (chosen,) = chosen_logprobs.chosen_logprobs(logits.clone(), torch.tensor([1]), 1.0, None, "none")
    chosen.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chosen.sum().backward()


def test_logits_are_made_twice_but_those_of_the_last_chunk(pair, monkeypatch):
    ours, _ = pair
    tokens = tokens_of(ours)
    wanted = torch.cat([torch.arange(n) for n in LENGTHS]) > 0
    made = []
    monkeypatch.setattr(
        token_model,
        "chosen_logprobs",
        lambda *args: made.append(len(args[1])) or chosen_logprobs.chosen_logprobs(*args),
    )
    monkeypatch.setattr(token_model, "_CHUNK_BYTES", 4 * 10 * ours.model.config.vocab_size)
    outputs(ours, tokens, wanted).logprobs.sum().backward()
    ours.zero_grad()
    # 25 tokens: three chunks of at most ten.
    assert made == [9, 9, 7, 9, 9]


def test_a_batch_without_loss_tokens_still_reaches_every_parameter(pair):
    ours, _ = pair
    tokens = tokens_of(ours)
    got = outputs(ours, tokens, torch.zeros(len(tokens), dtype=torch.bool))
    got.logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())
    ours.zero_grad()


def test_gradient_checkpointing_recomputes_the_layers_of_a_loaded_model(tiny_model_dir):
    """A model from disk is in evaluation mode, in which transformers' layers would not recompute."""
    block = ModelBlock(path=str(tiny_model_dir))
    calls: list[int] = []
    gradients = []
    for checkpointing in (False, True):
        module = load_token_model(block, seed=0, device=torch.device("cpu"), checkpointing=checkpointing)
        count = 0

        def counted(*_: object) -> None:
            nonlocal count
            count += 1

        module.model.get_decoder().layers[0].mlp.register_forward_pre_hook(counted)
        tokens = torch.arange(2, 8)
        layout = PackedLayout(np.array([0, 6]), torch.device("cpu"))
        module(tokens, torch.arange(6), layout, torch.arange(6) > 0).logprobs.sum().backward()
        calls.append(count)
        gradients.append(module.model.get_decoder().layers[0].mlp.up_proj.weight.grad.clone())
    assert calls == [1, 2]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
