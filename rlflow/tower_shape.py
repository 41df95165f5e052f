"""A tower's shape from a model's config, and how many parameters it and its projector have.

What it reads of a picture is patches; the language model sees one token for several of them:

    pixels -> patches [patches, values] -> layers of the tower -> projector -> tokens [patches / patches_per_token]

What a tower for sound reads is spectra, two at each of its positions, and two positions are a token, as Whisper's
encoder has them; a recording counts as the part of a window that it fills.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlflow.recipe.model_blocks import Part

PROJECTORS = ("merger", "merger_list", "deepstack_merger_list", "connector", "projector", "mm_projector", "aligner")
"""What towers call the projector within them."""
_BESIDE = {*PROJECTORS, "multi_modal_projector", "modality_projection", "vision_language_adapter"}
"""What names of stored tensors say where it stands beside the tower, too."""
_TOWERS = {"visual", "vision_model", "vision_tower", "vision_encoder", "vision", "audio_tower"}


@dataclass(frozen=True, slots=True)
class TowerShape:
    """What a tower's memory depends on. Its layers are counted as a decoder's are, with patches for tokens."""

    vision: int
    """Parameters."""
    projector: int
    """Parameters."""
    layers: int
    """0 where the config does not say how large they are."""
    hidden: int
    mlp_width: int
    heads: int
    activation: str
    patches_per_token: int
    values: int
    """Of a patch, as its pixels come in."""
    is_joint: bool
    """Queries, keys and values are one matrix, as of the Qwen-VL models."""
    has_qk_norms: bool = False
    vision_sides: int = 0
    """Inputs and outputs of all linear layers, summed: a LoRA has rank times as many parameters."""
    projector_sides: int = 0
    """As vision_sides."""

    @property
    def parameters(self) -> int:
        return self.vision + self.projector

    @property
    def query_width(self) -> int:
        return self.hidden

    @property
    def key_width(self) -> int:
        return self.hidden

    @property
    def is_gated(self) -> bool:
        """Qwen2.5-VL's; others have two matrices and LayerNorm."""
        return self.activation == "silu"

    def frozen(self, trained: Sequence[Part]) -> int:
        """Parameters that stay as they are where these parts are trained."""
        return (0 if {"vision", "audio"} & set(trained) else self.vision) + (
            0 if "projector" in trained else self.projector
        )


def tower_shape(config: Mapping[str, Any], stored: Mapping[str, Sequence[int]]) -> TowerShape | None:
    """None of a model that reads text alone.

    Args:
        config: Fields of the whole model's config.
        stored: Shapes of its tensors by name; none where its files are not here: then parameters are counted of the
            config, to within some hundredths.
    """
    fields = config.get("vision_config", config.get("audio_config"))
    if not isinstance(fields, dict):
        return None
    hidden = _number(fields, "hidden_size", "embed_dim", "d_model")
    layers = _number(fields, "depth", "num_hidden_layers", "num_layers", "encoder_layers")
    merged = _number(fields, "spatial_merge_size") ** 2 or _number(config, "scale_factor") ** 2 or 1
    channels = _number(fields, "in_channels", "in_chans", "num_channels") or 3
    tower = TowerShape(
        vision=0,
        projector=0,
        layers=layers if hidden else 0,
        hidden=hidden,
        mlp_width=_number(fields, "intermediate_size", "encoder_ffn_dim") or 4 * hidden,
        heads=_number(fields, "num_heads", "num_attention_heads", "encoder_attention_heads"),
        activation=str(fields.get("hidden_act", "gelu")),
        patches_per_token=merged,
        is_joint="spatial_merge_size" in fields,
        values=channels * _number(fields, "patch_size") ** 2 * max(1, _number(fields, "temporal_patch_size")),
    )
    if spectra := _number(fields, "num_mel_bins"):
        tower = replace(tower, values=2 * spectra, patches_per_token=2)
    return replace(tower, **(_stored(stored) if stored else _counted(tower, config, fields)))


def _stored(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Parameters of tower and projector among stored tensors, and sides of linear layers."""
    counts = {"vision": 0, "projector": 0, "vision_sides": 0, "projector_sides": 0}
    for name, shape in shapes.items():
        parts = set(name.split("."))
        if not parts & (_BESIDE | _TOWERS):
            continue
        part = "projector" if parts & _BESIDE else "vision"
        counts[part] += math.prod(shape)
        # Tables of positions are matrices too.
        if len(shape) == 2 and "embed" not in name.rsplit(".", 2)[-2]:
            counts[f"{part}_sides"] += sum(shape)
    return counts


def _counted(tower: TowerShape, config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, int]:
    """The matrices of all layers and of the patches' embedding; those of as many projectors as there are."""
    hidden = tower.hidden
    layer = 4 * hidden * hidden + (3 if tower.is_gated else 2) * hidden * tower.mlp_width
    places = _number(fields, "num_position_embeddings")
    vision = tower.layers * layer + (tower.values + places) * hidden
    text = config.get("text_config")
    output = _number(text if isinstance(text, dict) else {}, "hidden_size", "n_embd", "d_model")
    joined = hidden * tower.patches_per_token
    is_deep, number = bool(_number(fields, "spatial_merge_size")), 1 + len(fields.get("deepstack_visual_indexes") or ())
    attention = 6 * hidden if tower.is_joint else 8 * hidden
    mlp = (3 if tower.is_gated else 2) * (hidden + tower.mlp_width)
    return {
        "vision": vision,
        "projector": (joined * joined * is_deep + joined * output) * number,
        "vision_sides": tower.layers * (attention + mlp),
        "projector_sides": (2 * joined * is_deep + joined + output) * number,
    }


def _number(fields: Mapping[str, Any], *names: str) -> int:
    """The first of these fields that is a whole number; 0 where none is."""
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), 0)
