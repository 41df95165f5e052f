"""Models that are accepted have the numbers of plain transformers, and the others are refused by name.

The oracle is transformers' own model, from the same files, given one sequence at a time and token ids alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, StableLmModel
from transformers.models.qwen3_next import modeling_qwen3_next

from rlflow.actors.train_engines import token_model
from rlflow.actors.train_engines.packed_attention import PackedLayout
from rlflow.actors.train_engines.scalar_model import load_scalar_model
from rlflow.actors.train_engines.sequence_parallel import share_tokens
from rlflow.actors.train_engines.token_model import TokenModel, load_token_model
from rlflow.batching import pack
from rlflow.recipe import ModelBlock
from rlflow.recipe.architectures import why_not_packed
from rlflow.types import MicroBatch, Sample
from tests.actors.train_engines.architectures import GPT2, LLAMA, PACKED, PADDED, VOCABULARY, write

CPU = torch.device("cpu")
LENGTHS = (7, 19, 16)
EXACT = {"atol": 2e-5, "rtol": 0}


@pytest.fixture(scope="module")
def batch() -> MicroBatch:
    """Sequences longer than the windows of the models, packed together."""
    return packed_batch(LENGTHS)


def packed_batch(lengths: Sequence[int]) -> MicroBatch:
    generator = np.random.default_rng(0)
    samples = [
        Sample(generator.integers(2, VOCABULARY, n).astype(np.int32), np.arange(n) > 0, np.ones(n, np.float32))
        for n in lengths
    ]
    return pack(samples, max_tokens=99, num_ranks=1)[0][0]


def load(directory: Path, dtype="float32") -> TokenModel:
    return load_token_model(ModelBlock(path=str(directory), dtype=dtype), seed=0, device=CPU)


def sequences_of(batch: MicroBatch) -> list[torch.Tensor]:
    return [torch.from_numpy(ids).long() for ids in np.split(batch.token_ids, batch.cu_seqlens[1:-1])]


def plain_logprobs(model, batch: MicroBatch) -> torch.Tensor:
    found = []
    for ids in sequences_of(batch):
        logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        found += [torch.zeros(1), logprobs.gather(1, ids[1:, None]).squeeze(1)]
    return torch.cat(found)


def gradients(model, logprobs: torch.Tensor) -> torch.Tensor:
    loss = (logprobs * torch.linspace(-1, 1, len(logprobs))).sum()
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_logprobs_and_gradients_of_packed_sequences_are_those_of_each_alone_in_transformers(tmp_path, batch, kind):
    made = write(tmp_path, kind, (PACKED | PADDED)[kind])
    # transformers' default for Gemma 2 leaves out the cap on attention's logits.
    attention = "eager" if kind == "gemma2" else None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    ours = load(tmp_path)
    assert type(ours.model) is type(made)
    assert ours.passes.way == ("packed" if kind in PACKED else "padded")
    assert (why_not_packed(made.config.to_dict()) is None) == ours.passes.packs, "the plan says otherwise"
    expected, got = plain_logprobs(plain, batch), ours.of_batch(batch, CPU, entropies="none").logprobs
    torch.testing.assert_close(got, expected, **EXACT)
    one, other = gradients(ours.model, got), gradients(plain, expected)
    assert (one - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("kind", ["gemma3_text", "lfm2"])
def test_in_bfloat16_the_same_way_is_chosen(tmp_path, batch, kind):
    write(tmp_path, kind, (PACKED | PADDED)[kind])
    assert load(tmp_path, "bfloat16").passes.packs == (kind in PACKED)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("codegen", GPT2 | {"rotary_dim": 4}),
        ("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
        ("bloom", PADDED["bloom"]),
    ],
)
def test_a_later_token_moves_no_earlier_logprob(tmp_path, kind, config):
    """These make their masks where packed attention has none."""
    write(tmp_path, kind, config)
    ours = load(tmp_path)
    tokens = torch.tensor([5, 9, 12, 30, 7, 3])
    changed = tokens.clone()
    changed[-1] = 21
    with torch.no_grad():
        before, after = (ours.probe([ids])[0] for ids in (tokens, changed))
    assert torch.equal(before[:-1], after[:-1])
    assert before[-1] != after[-1]


def test_a_model_that_sees_what_comes_after_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, is_decoder=False, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertLMHeadModel: its numbers .* depend on .*it is no left-to-right model"):
        load(tmp_path)


def test_weights_that_are_no_numbers_are_refused_for_what_they_are(tmp_path):
    write(tmp_path, "llama", LLAMA)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: its numbers for a short text are not finite"):
        load(tmp_path)


def test_logits_that_are_made_in_another_way_are_refused(tmp_path, monkeypatch):
    write(tmp_path, "granite", PACKED["granite"])
    monkeypatch.setattr(token_model, "logit_scale", lambda config: 1.0)
    with pytest.raises(ValueError, match=r"GraniteForCausalLM: its numbers differ .* in a way that is not known here"):
        load(tmp_path)


def test_a_model_without_gradients_is_refused(tmp_path):
    """RWKV writes its state in place, over what its backward pass needs."""
    write(tmp_path, "rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "pad_token_id": 0})
    with pytest.raises(ValueError, match=r"RwkvForCausalLM: in evaluation mode it gives no gradients .*Choose another"):
        load(tmp_path)


def test_a_head_that_does_not_fit_the_decoder_is_refused_with_a_sentence(tmp_path):
    """ELECTRA has a layer between them, from hidden states to embeddings of another size."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    write(tmp_path, "electra", sizes | {"intermediate_size": 48, "is_decoder": True})
    with pytest.raises(ValueError, match=r"ElectraForCausalLM: its decoder and its head, called .* Choose another"):
        load(tmp_path)


def test_packed_attention_that_leaks_is_found(tmp_path, batch, monkeypatch):
    """One long sequence in the place of all."""
    write(tmp_path, "llama", PACKED["llama"])
    attend = PackedLayout.attend

    def as_one(layout, *args, **options):
        return attend(PackedLayout(np.array([0, layout.num_tokens]), CPU), *args, **options)

    monkeypatch.setattr(PackedLayout, "attend", as_one)
    ours = load(tmp_path)
    assert not ours.passes.packs and "depend on the others" in ours.passes.reason
    with torch.no_grad():
        expected = plain_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path), batch)
        torch.testing.assert_close(ours.of_batch(batch, CPU, entropies="none").logprobs, expected, **EXACT)


def test_packed_attention_whose_gradients_are_wrong_is_found(tmp_path, monkeypatch):
    """Its numbers are right."""
    write(tmp_path, "llama", PACKED["llama"])
    attend = PackedLayout.attend
    monkeypatch.setattr(PackedLayout, "attend", lambda layout, q, *args, **_: attend(layout, q.detach(), *args))
    ours = load(tmp_path)
    assert not ours.passes.packs and "its gradients differ from those of transformers'" in ours.passes.reason


def test_packed_attention_without_a_window_is_found_though_the_window_is_longer_than_the_texts(tmp_path, monkeypatch):
    write(tmp_path, "gemma3_text", PACKED["gemma3_text"] | {"sliding_window": 40})
    attend = PackedLayout.attend
    monkeypatch.setattr(PackedLayout, "attend", lambda layout, *args, **_: attend(layout, *args[:-1], None))
    ours = load(tmp_path)
    assert not ours.passes.packs and "its numbers differ" in ours.passes.reason


def test_what_differs_side_by_side_is_run_one_sequence_at_a_time(tmp_path, batch, monkeypatch):
    """A decoder whose rows see each other."""
    write(tmp_path, "stablelm", PADDED["stablelm"])
    forward = StableLmModel.forward

    def mixed(decoder, input_ids, **options):
        outputs = forward(decoder, input_ids, **options)
        if len(input_ids) > 1:
            outputs.last_hidden_state = outputs.last_hidden_state + outputs.last_hidden_state.flip(0)
        return outputs

    monkeypatch.setattr(StableLmModel, "forward", mixed)
    ours = load(tmp_path)
    assert ours.passes.way == "alone"
    with torch.no_grad():
        expected = plain_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path), batch)
        torch.testing.assert_close(ours.of_batch(batch, CPU, entropies="none").logprobs, expected, **EXACT)


@pytest.mark.parametrize(("heeding", "way"), [("both", "packed"), ("convolution", "padded"), ("rule", "padded")])
def test_layers_with_a_state_are_packed_where_all_their_kernels_heed_boundaries(
    tmp_path, batch, monkeypatch, heeding, way
):
    """As kernels on GPUs do: each sequence between two boundaries alone. transformers' stand-ins leave them aside."""
    write(tmp_path, "qwen3_next", PADDED["qwen3_next"])
    convolve, rule = modeling_qwen3_next.causal_conv1d_fn, modeling_qwen3_next.torch_chunk_gated_delta_rule

    def convolve_each(hidden, *args, seq_idx=None, **options):
        lengths = [hidden.shape[2]] if seq_idx is None else seq_idx[0].bincount().tolist()
        return torch.cat([convolve(part, *args, **options) for part in hidden.split(lengths, dim=2)], dim=2)

    def rule_of_each(query, key, value, *, g, beta, cu_seqlens=None, **options):
        lengths = [query.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, dim=1) for x in (query, key, value, g, beta)), strict=True)
        outputs, states = zip(*(rule(q, k, v, g=g, beta=b, **options) for q, k, v, g, b in parts), strict=True)
        return torch.cat(outputs, dim=1), states[-1]

    if heeding != "rule":
        monkeypatch.setattr(modeling_qwen3_next, "causal_conv1d_fn", convolve_each)
    if heeding != "convolution":
        monkeypatch.setattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule", rule_of_each)
    ours = load(tmp_path)
    assert ours.passes.way == way
    with torch.no_grad():
        expected = plain_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path), batch)
        torch.testing.assert_close(ours.of_batch(batch, CPU, entropies="none").logprobs, expected, **EXACT)
    with pytest.raises(ValueError, match="ranks can share what attention alone mixes"):
        share_tokens(ours, 2, CPU, timeout_s=5)


def test_windows_and_chunks_are_as_wide_after_the_probe_as_before(tmp_path):
    for kind, name in (("gemma3_text", "sliding_window"), ("llama4_text", "attention_chunk_size")):
        write(tmp_path / kind, kind, (PACKED | PADDED)[kind])
        model = load(tmp_path / kind).model
        holders = [model.config, *model.modules()]
        assert {size for holder in holders if (size := vars(holder).get(name)) is not None} == {6}


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "stablelm"])
def test_values_and_scores_are_those_of_transformers_classifier_of_each_sequence_alone(tmp_path, batch, kind):
    write(tmp_path, kind, (PACKED | PADDED)[kind])
    ours = load_scalar_model(ModelBlock(path=str(tmp_path)), seed=0, device=CPU)
    assert ours.passes.packs == (kind in PACKED)
    torch.nn.init.normal_(ours.model.get_submodule("score").weight, generator=torch.Generator().manual_seed(0))
    ours.model.save_pretrained(tmp_path / "classifier")
    plain = type(ours.model).from_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        scores, values = (ours(batch, CPU, wanted) for wanted in ("scores", "values"))
        texts = sequences_of(batch)
        expected = torch.cat([plain(input_ids=ids[None]).logits[0] for ids in texts])
        torch.testing.assert_close(scores, expected, **EXACT)
        # A token's value is the score of the text before it.
        prefixes = [torch.zeros(1), *(plain(input_ids=texts[0][None, :n]).logits[0] for n in range(1, LENGTHS[0]))]
        first = next(i for i, ids in enumerate(texts) if len(ids) == LENGTHS[0])
        start = int(batch.cu_seqlens[first])
        torch.testing.assert_close(values[start : start + LENGTHS[0]], torch.cat(prefixes), **EXACT)


def test_ranks_cannot_share_the_tokens_of_a_model_that_is_run_one_sequence_at_a_time(tmp_path):
    write(tmp_path, "stablelm", PADDED["stablelm"])
    with pytest.raises(ValueError, match=r"ranks can share what attention alone mixes .*sequence_parallel: 1"):
        share_tokens(load(tmp_path), 2, CPU, timeout_s=5)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotary_embedding_of_long_texts_is_not_that_of_others_beside_them(tmp_path, kind):
    """Beyond 15 tokens these turn by other angles, and dynamic ones by others for each length."""
    lengths = (7, 24, 19, 12)
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 15}
        config = LLAMA | {"rope_parameters": rope | factors, "max_position_embeddings": 40}
    else:
        config = LLAMA | {"rope_parameters": rope, "max_position_embeddings": 15}
    write(tmp_path, "llama", config)
    ours, batch = load(tmp_path), packed_batch(lengths)
    with torch.no_grad():
        for _ in range(2):
            got = ours.of_batch(batch, CPU, entropies="none").logprobs
            starts = [int(start) for start in batch.cu_seqlens]
            for ids, start, end in zip(sequences_of(batch), starts, starts[1:], strict=False):
                logits = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids[None]).logits[0, :-1]
                expected = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
                torch.testing.assert_close(got[start + 1 : end], expected, **EXACT)
