"""Vision-language models as transformers has them, and models that hear: which configs are theirs, and which parts a
model has.

model.visual, model.vision_model, ...          vision: the tower
model.audio_tower, ...                         audio: the tower of a model that hears
...merger, connector, multi_modal_projector    projector: from the tower's features to the language model's
model.language_model, lm_head, ...             language
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from rlflow.data.audios import NO_CLASSIFIER, NO_WRITER
from rlflow.recipe.model_blocks import Part
from rlflow.tower_shape import PROJECTORS

HEAD = "score"
"""transformers' name of a classifier's last layer."""


def sees(config: Any) -> bool:
    """Whether a config is of a model that is loaded with its vision tower.

    Where transformers also has a causal language model of the same config without the tower, that one is loaded.
    """
    kind = type(config)
    if "vision_config" not in config.sub_configs or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    with_tower = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
    return kind not in MODEL_FOR_CAUSAL_LM_MAPPING or MODEL_FOR_CAUSAL_LM_MAPPING[kind] is with_tower


def hears(config: Any) -> bool:
    """Whether a config is of a model that is loaded with a tower for sound, and has none for pictures."""
    kind, parts = type(config), config.sub_configs
    if not {"audio_config", "text_config"} <= set(parts) or "vision_config" in parts:
        return False
    is_known = kind in MODEL_FOR_MULTIMODAL_LM_MAPPING or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return is_known and kind not in MODEL_FOR_CAUSAL_LM_MAPPING


def has_tower(config: Any) -> bool:
    """Whether a config is of a model that is loaded with a tower beside its language model."""
    return sees(config) or hears(config)


def require_writer(config: Any) -> None:
    """
    Raises:
        ValueError: No engine here writes from such a model.
    """
    if hears(config):
        raise ValueError(f"{config.model_type} hears, and {NO_WRITER}")


def language_model_class(config: Any) -> Any:
    """transformers' class of automatic models that a language model of this config is loaded with.

    Raises:
        ValueError: It is of a model of sound whose parts are arranged otherwise.
    """
    kind = type(config)
    if hears(config):
        return AutoModelForMultimodalLM if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING else AutoModelForSeq2SeqLM
    if sees(config):
        return AutoModelForImageTextToText
    if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        parts = ", ".join(sorted(config.sub_configs))
        raise ValueError(
            f"{config.model_type} is of {parts}, and models that hear are trained here where they are of text_config "
            "and audio_config: name one of those, or a language model"
        )
    return AutoModelForCausalLM


def classifier_class(config: Any) -> Any:
    """transformers' class of automatic classifiers; a vision-language model that it has none of gets one of the form of
    its others, with a linear head called HEAD.

    Raises:
        ValueError: It is of a model that hears.
    """
    kind = type(config)
    if hears(config):
        raise ValueError(f"{config.model_type} hears, and {NO_CLASSIFIER}")
    if sees(config) and kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        base: Any = MODEL_MAPPING[kind]
        name = f"{base.__name__.removesuffix('Model')}ForSequenceClassification"
        family = next(parent for parent in base.__mro__[1:] if issubclass(parent, PreTrainedModel))
        made = type(name, (GenericForSequenceClassification, family), {"__module__": __name__})
        AutoModelForSequenceClassification.register(kind, made, exist_ok=True)
    return AutoModelForSequenceClassification


def own_classifier(model: PreTrainedModel) -> type | None:
    """The class of a classifier that `classifier_class` made, and transformers has not."""
    return next((kind for kind in type(model).__mro__ if kind.__module__ == __name__), None)


def classifier_code(kind: type) -> str:
    """The module that defines such a class for whoever loads the model with transformers alone."""
    family = next(parent for parent in kind.__mro__[1:] if issubclass(parent, PreTrainedModel))
    return (
        '"""A classifier of the last token, as transformers has them of other models."""\n\n'
        f"from {family.__module__} import {family.__name__}\n"
        "from transformers.modeling_layers import GenericForSequenceClassification\n\n\n"
        f"class {kind.__name__}(GenericForSequenceClassification, {family.__name__}):\n"
        "    pass\n"
    )


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the attention of a model's language part; a tower keeps its own."""
    if has_tower(model.config):
        model.set_attn_implementation({"text_config": name})  # pyright: ignore[reportArgumentType]
    else:
        model.set_attn_implementation(name)


def text_attention(model: PreTrainedModel) -> str:
    """The attention of a model's language part, as transformers calls it."""
    config = model.config.get_text_config() if has_tower(model.config) else model.config
    name = config._attn_implementation
    assert name is not None
    return name


def part_finder(model: PreTrainedModel) -> Callable[[str], Part]:
    """Tells of the name of a parameter or module of a model which part it is of; all of a text model is language."""
    if not has_tower(model.config):
        return lambda name: "language"
    prefixes = {id(module): prefix for prefix, module in model.named_modules()}
    of_sound = hears(model.config)
    # Where transformers finds none, it answers with the model itself, or with nothing.
    parts = (model.get_decoder(), model.get_encoder(modality="audio" if of_sound else "image"))
    language, tower = (prefixes.get(id(part), "") for part in parts)
    if not language or not tower:
        return lambda name: "language"
    heads = [prefix for prefix, module in model.named_modules() if module is model.get_output_embeddings()]
    return partial(_part, languages=(language, *heads, HEAD), tower=tower, kind="audio" if of_sound else "vision")


def train_parts(model: PreTrainedModel, parts: Iterable[Part]) -> None:
    """Freezes all parts of a model but these.

    Raises:
        ValueError: They are of a tower that the model has not, or it has no parameter of one of them.
    """
    part_of, wanted = part_finder(model), set(parts)
    found = {name: part_of(name) for name, _ in model.named_parameters()}
    if missing := sorted(wanted - set(found.values())):
        raise ValueError(
            f"model.train: {type(model).__name__} has no part called {', '.join(missing)}: it has "
            f"{', '.join(sorted(set(found.values())))}"
        )
    for name, parameter in model.named_parameters():
        if found[name] not in wanted:
            parameter.requires_grad_(False)


def _part(name: str, languages: Iterable[str], tower: str, kind: Part) -> Part:
    if any(_within(name, prefix) for prefix in languages):
        return "language"
    if not _within(name, tower):
        return "projector"
    # Beside a tower, whatever is not the language model is one.
    return "projector" if set(name.removeprefix(tower).split(".")) & set(PROJECTORS) else kind


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
