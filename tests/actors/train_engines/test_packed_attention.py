from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlflow.actors.train_engines import packed_attention
from rlflow.actors.train_engines.packed_attention import PackedLayout

LENGTHS = [5, 17, 1, 9, 30, 2, 16, 16]
CU_SEQLENS = np.concatenate([[0], np.cumsum(LENGTHS)])


def heads(num_heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CU_SEQLENS[-1], num_heads, 8, generator=generator, dtype=torch.float64)


def one_by_one(q, k, v, window=None):
    outputs = []
    for start, end in pairwise(CU_SEQLENS):
        one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        mask = (distance >= 0) & (distance < (window or 10**6))
        out = F.scaled_dot_product_attention(*one, attn_mask=mask, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_attention_equals_each_sequence_alone(window):
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    layout = PackedLayout(CU_SEQLENS, torch.device("cpu"))
    torch.testing.assert_close(layout.attend(q, k, v, None, window), one_by_one(q, k, v, window))


def test_gradients_equal_each_sequence_alone():
    inputs = [x.requires_grad_() for x in (heads(4, 0), heads(2, 1), heads(2, 2))]
    weight = heads(4, 3)
    layout = PackedLayout(CU_SEQLENS, torch.device("cpu"))
    packed = torch.autograd.grad((layout.attend(*inputs, None, None) * weight).sum(), inputs)
    alone = torch.autograd.grad((one_by_one(*inputs) * weight).sum(), inputs)
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["sinks", "softcap"])
def test_sinks_and_caps_are_those_of_their_formulas_with_the_same_gradients(kind, window):
    """Weights are exp(l_ij) / (exp(s) + sum_j exp(l_ij)) of a head with the sink s; a cap c: c tanh(l / c)."""
    sinks = torch.tensor([-1.0, 0.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    inputs = [x.requires_grad_() for x in (heads(4, 0), heads(2, 1), heads(2, 2))]
    weight = heads(4, 3)
    options: Any = {"sinks": sinks} if kind == "sinks" else {"softcap": 0.7}
    ours = PackedLayout(CU_SEQLENS, torch.device("cpu")).attend(*inputs, 0.3, window, **options)
    outputs = []
    for start, end in pairwise(CU_SEQLENS):
        q, k, v = (x[start:end].repeat_interleave(4 // x.shape[1], dim=1) for x in inputs)
        logits = 0.3 * torch.einsum("ihd,jhd->hij", q, k)
        if kind == "softcap":
            logits = 0.7 * torch.tanh(logits / 0.7)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        seen = (distance >= 0) & (distance < (window or 10**6))
        terms = logits.exp() * seen
        total = terms.sum(dim=2) + (sinks.exp()[:, None] if kind == "sinks" else 0)
        outputs.append(torch.einsum("hij,jhd->ihd", terms / total[..., None], v))
    theirs = torch.cat(outputs)
    torch.testing.assert_close(ours, theirs)
    trained = [*inputs, sinks] if kind == "sinks" else inputs
    both = (torch.autograd.grad((x * weight).sum(), trained, retain_graph=True) for x in (ours, theirs))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


def test_a_change_in_one_sequence_is_seen_by_no_other():
    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    layout = PackedLayout(CU_SEQLENS, torch.device("cpu"))
    before = layout.attend(q, k, v, None, None)
    changed = slice(int(CU_SEQLENS[4]), int(CU_SEQLENS[5]))
    for x in (q, k, v):
        x[changed] += 100.0
    after = layout.attend(q, k, v, None, None)
    others = torch.ones(len(q), dtype=torch.bool)
    others[changed] = False
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[changed], after[changed])


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_is_asked_for_the_same(window, monkeypatch):
    """No GPU: a stand-in computes what torch documents of its arguments, sequence by sequence."""

    def documented(q, k, v, bounds, key_bounds, longest, longest_key, *, scale, window_size, enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        assert bounds.dtype == torch.int32 and torch.equal(bounds, key_bounds)
        assert longest == longest_key == max(LENGTHS)
        outputs = []
        for start, end in pairwise(bounds.tolist()):
            one = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
            left, right = (10**6 if size == -1 else size for size in window_size)
            mask = (distance <= left) & (-distance <= right)
            out = F.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    q, k, v = heads(4, 0), heads(2, 1), heads(2, 2)
    layout = PackedLayout(CU_SEQLENS, torch.device("cpu"))
    expected = layout.attend(q, k, v, 0.3, window)
    monkeypatch.setattr(packed_attention, "varlen_attn", documented)
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda query, value: True)
    torch.testing.assert_close(layout.attend(q, k, v, 0.3, window), expected)


@pytest.mark.parametrize("window", [None, 4])
def test_repeated_keys_and_values_give_the_same_and_the_same_gradients(window, monkeypatch):
    """As on a GPU, where torch's kernel that saves memory takes no fewer of them than queries."""
    inputs = [x.requires_grad_() for x in (heads(4, 0), heads(2, 1), heads(2, 2))]
    weight = heads(4, 3)
    layout = PackedLayout(CU_SEQLENS, torch.device("cpu"))
    grouped = layout.attend(*inputs, None, window)
    of_grouped = torch.autograd.grad((grouped * weight).sum(), inputs)
    seen = []
    attention = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(packed_attention, "_repeats_heads", lambda query: True)
    repeated = layout.attend(*inputs, None, window)
    of_repeated = torch.autograd.grad((repeated * weight).sum(), inputs)
    assert set(seen) == {(4, 4, 4, False)}
    for ours, theirs in zip((repeated, *of_repeated), (grouped, *of_grouped), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_on_a_gpu_float32_never_writes_out_all_pairs_of_tokens():
    device, length = torch.device("cuda"), 4096
    layout = PackedLayout(np.array([0, length]), device)
    shapes = ((8, 64), (2, 64), (2, 64))
    inputs = [torch.randn(length, *shape, device=device, requires_grad=True) for shape in shapes]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    layout.attend(*inputs, None, None).sum().backward()
    # All pairs of one head's tokens would be 64 MiB, those of eight heads half a GiB.
    assert torch.cuda.max_memory_allocated(device) - before < 200 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_kernel_and_padding_agree(window, dtype, monkeypatch):
    device = torch.device("cuda")
    inputs = [x.to(device, dtype).requires_grad_() for x in (heads(4, 0), heads(2, 1), heads(2, 2))]
    weight = heads(4, 3).to(device, dtype)
    layout = PackedLayout(CU_SEQLENS, device)
    kernel = layout.attend(*inputs, None, window)
    of_kernel = torch.autograd.grad((kernel * weight).sum(), inputs)
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda query, value: False)
    padded = layout.attend(*inputs, None, window)
    of_padded = torch.autograd.grad((padded * weight).sum(), inputs)
    for ours, theirs in zip((kernel, *of_kernel), (padded, *of_padded), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_a_bucket_is_never_padded_by_more_than_a_quarter():
    lengths = np.random.default_rng(0).integers(1, 500, size=300)
    layout = PackedLayout(np.concatenate([[0], np.cumsum(lengths)]), torch.device("cpu"))
    buckets, _ = layout.padded
    for tokens in buckets:
        real = (tokens < layout.num_tokens).sum(dim=1)
        assert real.min() >= 0.75 * tokens.shape[1]


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "has_kernel"),
    [
        ((8, 0), torch.bfloat16, (64, 64), True),
        ((9, 0), torch.float16, (256, 256), True),
        ((7, 5), torch.float16, (64, 64), False),
        ((9, 0), torch.float32, (64, 64), False),
        ((9, 0), torch.bfloat16, (64, 128), False),
        ((9, 0), torch.bfloat16, (60, 60), False),
    ],
)
def test_flash_attention_is_there_since_ampere_in_16_bits_for_heads_of_one_size(
    monkeypatch, capability, dtype, sizes, has_kernel
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    query, value = (SimpleNamespace(shape=(1, 1, size), is_cuda=True, dtype=dtype, device="cuda") for size in sizes)
    assert packed_attention._has_kernel(cast(Any, query), cast(Any, value)) == has_kernel
