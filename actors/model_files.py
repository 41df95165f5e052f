"""A transformers model as a directory that transformers and vLLM load.

transformers 5 writes names that version 4 does not know, and version 4 puts defaults in the place of what it does not
find, without a word: another base of the rotary embeddings, another number of experts. config.json has both names.
Both leave a cap on attention's logits (Gemma 2) out in their default attention: config.json names one that has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlflow.data.tokenizer import GENERATION_CONFIG
from rlflow.recipe import ModelBlock

CLASSIFIER = "modeling_classifier"
"""The module of a classifier that transformers has none of."""
_THETA, _PARTIAL = "rope_theta", "partial_rotary_factor"
_OLD_ROPE_NAMES = {"gpt_neox": {_THETA: "rotary_emb_base", _PARTIAL: "rotary_pct"}}
"""By model_type, where version 4 has its own."""
_OLD_LOCAL_NAMES = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
"""Of the base in layers that attend to a window alone."""
_PHI3_SCALING = {"rope_type", "type", "short_factor", "long_factor", "original_max_position_embeddings"}


def write_trained(model: Any, block: ModelBlock, directory: Path, weights: dict[str, Any]) -> None:
    """Writes what was trained: a model, or the adapter alone where the recipe has one, as PEFT reads it.

    Args:
        model: The trained one, for its configs; its own weights are not read.
        weights: Whole tensors by their names in the model; of an adapter, what is trained.
    """
    if block.adapter is None:
        save_model(model, directory, weights)
        return
    from rlflow.actors import adapters

    adapters.write(directory, model, weights.items())
    if block.adapter.subtracts_start:
        from rlflow.actors.prepared_adapters import fold_start

        assert block.adapter.path is not None
        fold_start(directory, Path(block.adapter.path))
    save_generation_config(model, directory)


def save_model(model: Any, directory: Path, weights: dict[str, Any] | None = None) -> None:
    """``save_pretrained``, with the generation config that the model was loaded with, and a config for version 4 too.

    Args:
        weights: By name; the model's own when left out.
    """
    from transformers import GenerationConfig

    if not model.can_generate():
        model.save_pretrained(directory, state_dict=weights)
        _write_config(model, directory, weights)
        _write_code(model, directory)
        return
    own = model.generation_config
    # transformers loads settings that contradict each other, as several published models have, and refuses to save
    # them.
    model.generation_config = GenerationConfig()
    model.save_pretrained(directory, state_dict=weights)
    model.generation_config = own
    _write_config(model, directory, weights)
    save_generation_config(model, directory)


def save_generation_config(model: Any, directory: Path) -> None:
    """Writes the generation config of a model that generates, as it is."""
    model.generation_config.to_json_file(directory / GENERATION_CONFIG, use_diff=True)


def _write_config(model: Any, directory: Path, weights: dict[str, Any] | None) -> None:
    """With the dtype of the weights written: a trainer may hold them in more bits than it hands out."""
    if weights:
        model.config.dtype = next(iter(weights.values())).dtype
        model.config.save_pretrained(directory)
    path = directory / "config.json"
    config = with_old_names(model.config, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_code(model: Any, directory: Path) -> None:
    """Writes the class of a classifier that transformers has none of, as code that `trust_remote_code` loads."""
    from rlflow.actors.vision import classifier_code, own_classifier

    if (kind := own_classifier(model)) is None:
        return
    (directory / f"{CLASSIFIER}.py").write_text(classifier_code(kind), encoding="utf-8")
    path = directory / "config.json"
    names = {"AutoModelForSequenceClassification": f"{CLASSIFIER}.{kind.__name__}"}
    written = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": names, "architectures": [kind.__name__]}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def with_old_names(config: Any, written: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, and those that version 4 of transformers reads in their stead.

    Args:
        config: The PreTrainedConfig that was written: it knows by which other names its fields go.
    """
    fields = dict(written)
    for name in config.sub_configs:
        if isinstance(fields.get(name), dict):
            fields[name] = with_old_names(getattr(config, name), fields[name])
    for other_name, name in config.attribute_map.items():
        if name in fields:
            fields.setdefault(other_name, fields[name])
    if fields.get("attn_logit_softcapping") is not None:
        fields["attn_implementation"] = "eager"
    if isinstance(fields.get("dtype"), str):
        fields["torch_dtype"] = fields["dtype"]
    if isinstance(fields.get("rope_parameters"), dict):
        fields |= _old_rope_fields(str(fields.get("model_type")), fields["rope_parameters"])
    return fields


def _old_rope_fields(model_type: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Version 4 has one scaling a model: of layers that attend to all tokens, where layers differ."""
    names = {_THETA: _THETA, _PARTIAL: _PARTIAL} | _OLD_ROPE_NAMES.get(model_type, {})
    everywhere = parameters.get("full_attention") or parameters
    fields = {names[key]: everywhere[key] for key in names if everywhere.get(key) is not None}
    scaling = {key: value for key, value in everywhere.items() if key not in names}
    if model_type == "phi3" and "short_factor" in scaling and scaling.keys() <= _PHI3_SCALING:
        # Version 4 refuses the others, and has them elsewhere.
        scaling = {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    if scaling != {"rope_type": "default"}:
        fields["rope_scaling"] = scaling
    local = parameters.get("sliding_attention")
    if local and model_type in _OLD_LOCAL_NAMES:
        fields[_OLD_LOCAL_NAMES[model_type]] = local[_THETA]
    return fields
