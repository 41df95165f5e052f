"""Models of checkpoints, and of whole checkpoints alone: transformers fills what is missing with random numbers, leaves
out what it has no place for, and says both in its log."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from rlflow.actors.dequantized import as_numbers, make_plain
from rlflow.actors.vision import language_model_class
from rlflow.recipe.stored_formats import DEQUANTIZED, format_problem, stored_format


def load_language_model(path: str, *, dtype: Any, **options: Any) -> PreTrainedModel:
    """The language model or vision-language model of a directory or hub id, whole.

    Args:
        dtype: As ``from_pretrained`` takes it.
        options: ``revision``, ``trust_remote_code``, ``as_stored``.

    Raises:
        ValueError: As ``load_whole``; or it is a model of sound.
    """
    config = AutoConfig.from_pretrained(path, **{key: options[key] for key in options if key != "as_stored"})
    return load_whole(language_model_class(config), path, dtype=dtype, **options)


def load_whole(
    auto_class: Any,
    path: str,
    *,
    new: str | None = None,
    as_stored: bool = False,
    has_adapter: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """``auto_class.from_pretrained``; weights in few bits become the numbers that they stand for.

    Args:
        new: A module that the checkpoint may lack: it starts from random weights.
        as_stored: Weights in few bits stay so, to be served or measured.
        has_adapter: It stays as it is, and an adapter is trained.

    Raises:
        ValueError: The checkpoint has not the weights of the model that its config.json describes, or has them in a
            format that transformers does not read; with a remedy.
    """
    given = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    method = stored_format(AutoConfig.from_pretrained(path, **given).to_dict())
    if as_stored:
        _refuse_format(path, method)
    elif problem := format_problem(path, method, has_adapter=has_adapter, rounds="quantization_config" in options):
        raise ValueError(problem)
    elif method in DEQUANTIZED:
        options["quantization_config"] = as_numbers(method)
    with warnings.catch_warnings():
        # What is said of the format in config.json stays as it is.
        warnings.filterwarnings("ignore", message="You passed `quantization_config` or equivalent parameters")
        loaded: Any = auto_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, loading = loaded
    if method in DEQUANTIZED and not as_stored:
        make_plain(model, options.get("dtype"))
    missing = [name for name in loading["missing_keys"] if new is None or not name.startswith(f"{new}.")]
    problems = []
    if missing:
        problems.append(f"it lacks {_named(missing)}")
    if unused := [name for name in loading["unexpected_keys"] if _belongs(name, model)]:
        problems.append(f"it has {_named(unused)}, which that leaves out")
    for name, stored, wanted in sorted(loading["mismatched_keys"])[:1]:
        problems.append(f"its {name} has shape {list(stored)}, and config.json says {list(wanted)}")
    if _head_is_its_own(model):
        problems.append(
            "it has a head of its own, and its config.json ties it to the embeddings, as vLLM would (give config.json "
            '"tie_word_embeddings": false)'
        )
    if problems:
        raise ValueError(
            f"{path} is no {type(model).__name__}: {'; '.join(problems)}. Name a model whose weights are those of its "
            "config.json, or fetch it again"
        )
    return model


def _head_is_its_own(model: PreTrainedModel) -> bool:
    """Whether transformers has left a head apart, as the files have another than the embeddings, though the config ties
    them."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    is_tied = any(model.get_parameter(name) is head.weight for name in tied)
    return is_tied and head.weight is not model.get_input_embeddings().weight


def _refuse_format(path: str, method: str | None) -> None:
    """Raises ValueError for 4-bit weights that transformers reads with a package of kernels for GPUs, and that is not
    there."""
    if method in ("awq", "gptq") and find_spec("gptqmodel") is None:
        raise ValueError(
            f"{path} has its weights in {method}'s format, which transformers reads with gptqmodel alone: "
            "--engine vllm reads it, or name the model that it was made of"
        )


def _belongs(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight that the model has no place for is one of what it computes: a bias of its linear layers, a norm
    within its decoder layers. Heads, vision towers and layers beyond its own are not, nor are buffers."""
    prefix = model.base_model_prefix
    # Names are those of the file, which may be of the model without its head.
    return any(_is_part(candidate, model) for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")))


def _is_part(name: str, model: nn.Module) -> bool:
    module, path = model, name.split(".")
    for depth, part in enumerate(path[:-1]):
        child = module._modules.get(part)
        if child is None:
            # Within a layer, whose name has a number.
            return path[-1] in ("weight", "bias") and any(step.isdigit() for step in path[:depth])
        module = child
    return any(True for _ in module.parameters(recurse=False))


def _named(names: Iterable[str], shown: int = 3) -> str:
    ordered: Sequence[str] = sorted(names)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + more
