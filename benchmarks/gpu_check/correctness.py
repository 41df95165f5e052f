"""Numbers of a GPU against plain transformers and torch, in more bits or on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from measurements import Record, Skip
from models import (
    SHAPES,
    denominators_of,
    device,
    load,
    make_engine,
    make_trainer,
    plain_logprobs,
    random_batch,
    random_policy,
    recipe_of,
    save_policy,
    write_config,
)

from rlflow.actors.rollout_engines.engine import generate
from rlflow.actors.weight_sync import unpack_weights
from rlflow.recipe import ModelBlock
from rlflow.types import Completion, MicroBatch, SampleRequest, SamplingParams

VOCABULARY = SHAPES["small"]["vocab_size"]
LENGTHS = [7, 90, 33, 150, 64]
LEARNING_RATE = 1e-3


def engine_logprobs(record: Record, name: str, dtype: str, shape: str = "small") -> None:
    """An engine's logprobs may be off by twice what transformers' own are in the same dtype, and must follow a sync.

    Of each completion of the second weights, 16 tokens are of the first: they were loaded while it was under way.

    Args:
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
    """
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    directory = write_config(shape, record.directory)
    policies = [random_policy(directory, seed, getattr(torch, dtype)) for seed in (0, 1)]
    engine = make_engine(name, directory, dtype, record.directory / "vllm.log")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCABULARY, (5, 40, 130)[i // 8]).astype(np.int32) for i in range(24)]
    params = SamplingParams(max_new_tokens=48)
    requests = [SampleRequest(i, prompt, i, params) for i, prompt in enumerate(prompts)]
    for version, policy in enumerate(policies):
        when = "after a sync" if version else "at first"
        if version:
            engine.add(requests)
            for _ in range(16):
                engine.step()
        load(engine, policy, version)
        completions = _finish(engine, requests) if version else generate(engine, requests)
        record.add(
            f"tokens of older weights {when}",
            sum(int((c.versions < version).sum()) for c in completions),
            least=24 * 16 * version,
            most=24 * 16 * version,
        )
        sequences = [np.concatenate([p, c.token_ids]) for p, c in zip(prompts, completions, strict=True)]
        is_own = np.concatenate([c.versions == version for c in completions])
        reported = np.concatenate([c.logprobs for c in completions]).astype(np.float64)[is_own]

        def by(model: Any, of: Any = sequences, after: Any = prompts, is_sampled: Any = is_own) -> np.ndarray:
            own = [plain_logprobs(model, s)[len(p) - 1 :] for s, p in zip(of, after, strict=True)]
            return np.concatenate(own)[is_sampled]

        same = by(policy.to(device()))
        exact = by(policy.double())
        own = float(np.abs(same - exact).mean())
        record.add(f"transformers' own mean error {when}", own)
        record.add(f"mean error of logprobs {when}", np.abs(reported - exact).mean(), most=2 * own + 1e-4)
        record.add(f"largest error of logprobs {when}", np.abs(reported - exact).max())
        other = policies[1 - version].to(device()).double()
        record.add(f"mean distance to the other weights {when}", np.abs(reported - by(other)).mean(), least=0.5)
        policy.to(dtype=getattr(torch, dtype), device="cpu")
        other.to(dtype=getattr(torch, dtype), device="cpu")
    if name == "vllm" and torch.cuda.is_available():
        _sleep(record, engine, requests)
    engine.close()


def _sleep(record: Record, engine: Any, requests: list[SampleRequest]) -> None:
    """Memory that an engine gives back in its sleep, and that it says the same when it wakes."""
    before = generate(engine, requests)
    used = _gib_in_use()
    engine.sleep()
    record.add("memory in use while it sleeps, over that of before", _gib_in_use() / used, most=0.5)
    engine.wake()
    after = generate(engine, requests)
    same = [np.array_equal(a.token_ids, b.token_ids) for a, b in zip(before, after, strict=True)]
    record.add("completions that are the same behind a sleep", sum(same) / len(same), least=0.9)


def _gib_in_use() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def _finish(engine: Any, requests: list[SampleRequest]) -> list[Completion]:
    """Steps until all of them have finished, in their order."""
    finished: dict[int, Completion] = {}
    while len(finished) < len(requests):
        finished |= {completion.id: completion for completion in engine.step()}
    return [finished[request.id] for request in requests]


def train_steps(record: Record, settings: Mapping[str, Any]) -> None:
    """Two steps of a trainer, and the same by plain torch on the CPU, one sequence at a time, in float32."""
    directory = write_config("small", record.directory)
    plain = save_policy(directory, seed=0)
    recipe = recipe_of(directory, settings)
    is_exact = recipe.model.dtype == "float32"
    trainer = make_trainer(recipe)
    batches = [random_batch(LENGTHS, VOCABULARY, seed) for seed in (0, 1)]
    of_trainer = trainer.logprobs(batches[:1])[batches[0].loss_mask]
    of_plain = np.concatenate([_trained_logprobs(plain, batches[0], s).detach().numpy() for s in range(len(LENGTHS))])
    record.add("mean error of logprobs", np.abs(of_trainer - of_plain).mean(), most=1e-4 if is_exact else 0.05)
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step, batch in enumerate(batches):
        trainer.forward_backward([batch], recipe.algorithm, denominators_of(batch))
        norm = trainer.optim_step(LEARNING_RATE).grad_norm
        optimizer.zero_grad()
        for sequence in range(len(LENGTHS)):
            (-_trained_logprobs(plain, batch, sequence).sum() / batch.loss_mask.sum()).backward()
        plain_norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), recipe.trainer.max_grad_norm))
        optimizer.step()
        error = abs(norm - plain_norm) / plain_norm
        record.add(f"relative error of the gradient's norm, step {step + 1}", error, most=1e-3 if is_exact else 0.05)
    snapshot = trainer.weights(1)
    assert snapshot is not None
    after = {name: tensor.float() for name, tensor in unpack_weights(snapshot)}
    ours = torch.cat([(after[name] - before[name]).flatten() for name in before])
    theirs = torch.cat([(p.detach() - before[name]).flatten() for name, p in plain.named_parameters()])
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    record.add("cosine of the change of all weights", cosine, least=0.999 if is_exact else 0.8)


def _trained_logprobs(policy: Any, batch: MicroBatch, sequence: int) -> torch.Tensor:
    """Of a sequence's loss tokens, with a gradient, by the model's own forward pass on it alone."""
    part = slice(int(batch.cu_seqlens[sequence]), int(batch.cu_seqlens[sequence + 1]))
    ids = torch.from_numpy(batch.token_ids[part].astype(np.int64)).to(policy.device)
    logprobs = torch.log_softmax(policy(ids[None]).logits[0, :-1].float(), dim=-1)
    chosen = logprobs.gather(1, ids[1:, None]).squeeze(1)
    return chosen[torch.from_numpy(batch.loss_mask[part][1:]).to(policy.device)]


def packed_kernel(record: Record) -> None:
    """Attention over packed sequences in bfloat16 by torch's variable-length kernel, against float32 by padding."""
    from rlflow.actors.train_engines import packed_attention
    from rlflow.actors.train_engines.packed_attention import PackedLayout

    torch.manual_seed(0)
    bounds = np.cumsum([0, 700, 3, 129, 1, 512])
    inputs = [torch.randn(int(bounds[-1]), heads, 64, device=device()) for heads in (8, 2, 2)]
    weight = torch.randn(int(bounds[-1]), 8, 64, device=device())
    for window in (None, 64):
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            given = [x.to(dtype).requires_grad_() for x in inputs]
            if (dtype == torch.bfloat16) != packed_attention._has_kernel(given[0], given[2]):
                raise Skip("torch's kernel does not take these heads on this GPU")
            out = PackedLayout(bounds, device()).attend(*given, None, window)
            results.append([out, *torch.autograd.grad((out * weight.to(dtype)).sum(), given)])
        for what, ours, exact in zip(("outputs", "queries", "keys", "values"), *results, strict=True):
            error = float((ours.float() - exact).norm() / exact.norm())
            record.add(f"relative error of {what}, window {window}", error, most=0.02)


def liger(record: Record) -> None:
    """Logprobs and gradients with Liger's kernels and without."""
    from rlflow.actors.train_engines.token_model import load_token_model

    directory = write_config("small", record.directory)
    save_policy(directory, seed=0)
    batch = random_batch(LENGTHS, VOCABULARY, seed=0)
    logprobs, gradients = [], []
    for with_kernels in (False, True):
        block = ModelBlock(path=str(directory), dtype="float32", liger=with_kernels)
        model = load_token_model(block, seed=0, device=device())
        out = model.of_batch(batch, device(), entropies="none").logprobs
        (-out.sum() / batch.loss_mask.sum()).backward()
        logprobs.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    record.add("largest difference of logprobs", (logprobs[1] - logprobs[0]).abs().max(), most=1e-2)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    record.add("relative difference of the gradient", error, most=1e-2)


def four_bits(record: Record) -> None:
    """The base's logprobs are those of its weights taken out of four bits; a step trains the adapter alone."""
    import bitsandbytes.functional as of_bits
    from bitsandbytes.nn import Linear4bit

    directory = write_config("small", record.directory)
    plain = save_policy(directory, seed=0)
    adapter = {"model.adapter": {"kind": "lora", "rank": 8, "quantize": "nf4"}}
    recipe = recipe_of(directory, adapter)
    trainer = make_trainer(recipe)
    batch = random_batch(LENGTHS, VOCABULARY, seed=0)
    weights = dict(plain.named_parameters())
    num_quantized = 0
    for name, module in trainer.module.model.named_modules():
        if isinstance(module, Linear4bit):
            own_name = name.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"
            packed: Any = module.weight
            whole = of_bits.dequantize_4bit(packed.data, packed.quant_state)
            weights[own_name].data.copy_(whole.cpu())
            num_quantized += 1
    record.add("layers in four bits", num_quantized, least=1)
    of_plain = np.concatenate([_trained_logprobs(plain, batch, s).detach().numpy() for s in range(len(LENGTHS))])
    before = trainer.logprobs([batch])
    record.add("mean error of logprobs", np.abs(before[batch.loss_mask] - of_plain).mean(), most=0.02)
    trainer.forward_backward([batch], recipe.algorithm, denominators_of(batch))
    trainer.optim_step(LEARNING_RATE)
    record.add("mean change of logprobs by a step", np.abs(trainer.logprobs([batch]) - before).mean(), least=1e-4)
    change = np.abs(trainer.reference_logprobs([batch]) - before).max()
    record.add("largest change of the base's logprobs by a step", change, most=1e-5)


def eight_bits(record: Record) -> None:
    """Ten steps on one batch raise its logprobs, with moments in eight bits as with whole ones."""
    directory = write_config("small", record.directory)
    save_policy(directory, seed=0)
    batch = random_batch(LENGTHS, VOCABULARY, seed=0)
    gains = []
    for kind in ("adamw", "adamw_8bit"):
        recipe = recipe_of(directory, {"trainer.optimizer.kind": kind})
        trainer = make_trainer(recipe)
        before = trainer.logprobs([batch])[batch.loss_mask].mean()
        for _ in range(10):
            trainer.forward_backward([batch], recipe.algorithm, denominators_of(batch))
            trainer.optim_step(LEARNING_RATE)
        gains.append(float(trainer.logprobs([batch])[batch.loss_mask].mean() - before))
    record.add("gain of logprobs in ten steps", gains[0], "nats", least=0.1)
    record.add("the same with eight bits", gains[1], "nats", least=0.8 * gains[0], most=1.2 * gains[0])
