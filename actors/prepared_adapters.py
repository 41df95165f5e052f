"""Starts of a LoRA that PEFT computes of the model and some data, written before training as an adapter to go on from.

    init_lora_weights: eva | lora_ga | corda | pissa | olora --> initial_adapter/ with A0 and B0 --> training

PEFT takes s B0 A0 out of the base where it is not 0. Here the base stays as it is, on disk and in every process, and
the model computes W + s (B A - B0 A0): a second, frozen adapter takes the start away. The reference is the base, and
what is exported is PEFT's own conversion, a LoRA of twice the rank with A = [A; A0] and B = [B, -B0].
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlflow.actors import adapters
from rlflow.actors.adapter_targets import check_named
from rlflow.actors.pretrained import load_whole
from rlflow.actors.vision import language_model_class
from rlflow.checkpoint import FINAL_MANIFEST, publish_directory
from rlflow.recipe import ModelBlock
from rlflow.recipe.adapter_files import CONFIG, WEIGHTS
from rlflow.recipe.prepared_starts import INIT, OPTIONS, prepared_start

MOST_TEXTS, MOST_TOKENS = 64, 512
_BATCH = 8
_MOST_PASSES = 500
"""Forward passes of a batch, in which EVA's components converge; some tens are usual."""
_CONFIGS = {"eva_config": peft.EvaConfig, "lora_ga_config": peft.LoraGAConfig, "corda_config": CordaConfig}

Text = tuple[torch.Tensor, torch.Tensor]
"""Token ids [T], and which of them are learnt, bool [T]."""


def write_prepared(block: ModelBlock, texts: Sequence[Text], directory: Path, *, seed: int) -> None:
    """Writes the adapter that training starts from.

    Args:
        texts: At most ``MOST_TEXTS``, of at most ``MOST_TOKENS``; none where the start reads none.

    Raises:
        ValueError: The start cannot be computed of this model and these texts.
        DiskError: It cannot be written.
    """
    assert block.path is not None and block.adapter is not None
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"revision": block.revision, "trust_remote_code": block.trust_remote_code}
    config = AutoConfig.from_pretrained(block.path, **options)
    model = load_whole(language_model_class(config), block.path, dtype=getattr(torch, block.dtype), **options)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # pyright: ignore[reportArgumentType]
    torch.manual_seed(seed)
    fields = block.adapter.config
    start = fields[INIT].lower()
    of_start = [name for name in OPTIONS if start == name.removesuffix("_config")]
    try:
        options = {name: _CONFIGS[name](**(fields.get(name) or {})) for name in of_start}
        config = adapters.settled_config(model, block, {**fields, INIT: start, **options})
        if config.target_modules == "all-linear":
            config.target_modules = _linear_names(model, config.exclude_modules)
        _put_in(model, config, texts)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"model.adapter.peft.{INIT}: {start}: {error}") from error
    check_named(model, config, fields)
    written = adapters.config_of(model)
    for name in OPTIONS:
        setattr(written, name, None)
    setattr(written, INIT, True)
    tensors = {name: parameter.float() for name, parameter in adapters.adapter_parameters(model).items()}
    publish_directory(
        directory, {"start": start}, lambda target: adapters.write(target, model, tensors.items()), FINAL_MANIFEST
    )


def is_written(directory: Path) -> bool:
    """Whether an earlier start of the run has written it."""
    return (directory / FINAL_MANIFEST).is_file()


def fold_start(directory: Path, start: Path) -> None:
    """Makes of an adapter, whose start is taken away, a LoRA by itself: of twice the rank, on the base as it is.

    Args:
        directory: The adapter's, which is written over.
        start: Of the adapter that it started from.
    """
    values, begun = load_file(directory / WEIGHTS), load_file(start / WEIGHTS)
    folded = {}
    for name, tensor in values.items():
        is_a = ".lora_A." in name
        folded[name] = torch.cat([tensor, begun[name] if is_a else -begun[name]], dim=0 if is_a else 1).contiguous()
    save_file(folded, directory / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    # The scale is alpha over the rank, or over its root.
    factor = math.sqrt(2) if config["use_rslora"] else 2
    config["r"], config["lora_alpha"] = 2 * config["r"], factor * config["lora_alpha"]
    config["rank_pattern"] = {name: 2 * rank for name, rank in (config["rank_pattern"] or {}).items()}
    config["alpha_pattern"] = {name: factor * alpha for name, alpha in (config["alpha_pattern"] or {}).items()}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _linear_names(model: PreTrainedModel, left_out: Any) -> list[str]:
    """Whole names of all linear layers but the head: not all of PEFT's functions know all-linear."""
    head, without = model.get_output_embeddings(), set(left_out or ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name not in without
    ]


def _put_in(model: PreTrainedModel, config: peft.LoraConfig, texts: Sequence[Text]) -> None:
    """Puts the adapter into the model, as PEFT documents it for each start."""
    assert texts or not (start := prepared_start({INIT: config.init_lora_weights})) or not start.reads_data
    match config.init_lora_weights:
        case "eva":
            adapted = peft.get_peft_model(model, config)
            batches = list(_batches(texts, _BATCH))
            peft.initialize_lora_eva_weights(adapted, batches, forward_fn=_limited(), show_progress_bar=False)
            return
        case "lora_ga":
            preprocess_loraga(model, config, lambda: _learn(model, texts))
        case "corda":
            preprocess_corda(model, config, lambda: _read(model, texts))
    peft.get_peft_model(model, config)


def _limited() -> Callable[[Any, Any], Any]:
    """A forward pass that ends a search which does not."""
    calls = 0

    def forward(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        nonlocal calls
        calls += 1
        if calls > _MOST_PASSES:
            raise ValueError(
                f"the components of what layers read have not converged in {_MOST_PASSES} forward passes: more or "
                "longer rows, or a lower r, eva_config.rho or eva_config.tau"
            )
        return model(**inputs)

    return forward


def _learn(model: PreTrainedModel, texts: Sequence[Text]) -> None:
    for batch in _batches(texts, _BATCH):
        model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss.backward()


@torch.no_grad()
def _read(model: PreTrainedModel, texts: Sequence[Text]) -> None:
    # PEFT's covariance is of one text a pass.
    for batch in _batches(texts, 1):
        model(input_ids=batch["input_ids"].to(model.device))


def _batches(texts: Sequence[Text], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Texts padded to the longest; what is not learnt has the label -100."""
    for first in range(0, len(texts), size):
        part = texts[first : first + size]
        longest = max(len(ids) for ids, _ in part)
        ids, labels, mask = (torch.full((len(part), longest), fill) for fill in (0, -100, 0))
        for row, (of_text, is_learnt) in enumerate(part):
            ids[row, : len(of_text)], mask[row, : len(of_text)] = of_text, 1
            labels[row, : len(of_text)] = torch.where(is_learnt, of_text, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}
