"""A Hugging Face directory, rounded layer by layer to a scheme of compressed-tensors, which transformers and vLLM read.

Only one layer at a time is held in memory. What is not quantised stays as it is but for its dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.data.errors import DataError
from rlflow.quantization.linear_layers import find_layers, read_config
from rlflow.quantization.schemes import Scheme, group_size_for

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme

_INDEX = "model.safetensors.index.json"

Progress = Callable[[int, int], None]


def weight_files(source: Path) -> list[Path]:
    """
    Raises:
        DataError: There are none that are safetensors.
    """
    index = source / _INDEX
    names = (
        set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if index.is_file()
        else {"model.safetensors"}
    )
    files = sorted(source / name for name in names)
    if not all(file.is_file() for file in files):
        raise DataError(f"{source} has no weights as safetensors: fetch them, or save the model with save_pretrained")
    return files


def quantize_directory(
    source: Path, directory: Path, scheme: Scheme, *, dtype: str | None, trust_remote_code: bool, progress: Progress
) -> int | None:
    """Writes the weights of ``source`` in the scheme, and its config.json, into a directory that exists.

    Args:
        dtype: Of what is not quantised, and of scales; the model's own when None, bfloat16 for one in float32.
        progress: Hears how many tensors are written, and of how many.

    Returns:
        The group size; None of a scheme with a scale a row.

    Raises:
        DataError: The model cannot be quantised, or not so.
        OSError: The directory cannot be written.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    config, files = read_config(source), weight_files(source)
    shapes = shapes_in(files)
    layers = find_layers(source, shapes, scheme, trust_remote_code=trust_remote_code)
    group_size = group_size_for(layers.widths) if scheme.is_grouped else None
    kept = getattr(torch, dtype or half_of(config))
    how = _how(scheme, group_size)
    places: dict[str, str] = {}
    size = done = 0
    for file in files:
        written: dict[str, torch.Tensor] = {}
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                tensor, layer = stored.get_tensor(name), name.removesuffix(".weight")
                require_finite(name, tensor, kept)
                if layer in layers.shapes and name != layer:
                    written |= {f"{layer}.{part}": one for part, one in round_weight(tensor, how, kept).items()}
                else:
                    written[name] = tensor.to(kept) if tensor.is_floating_point() else tensor
                done += 1
                progress(done, len(shapes))
        save_file(written, directory / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(written, file.name)
        size += sum(tensor.nbytes for tensor in written.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_config(directory, config, str(kept).removeprefix("torch."), scheme, how, layers.ignored)
    return group_size


def round_weight(weight: torch.Tensor, how: QuantizationScheme, kept: torch.dtype) -> Mapping[str, torch.Tensor]:
    """A linear layer's weight [outputs, inputs] as the tensors that are stored in its place, by their names' ends.

    Scales are those of the largest absolute value in a row or group, symmetric about zero. They are stored in 16 bits,
    and weights are divided by what is stored, in float32: the quotient needs more bits than bfloat16 has.
    """
    import torch
    from compressed_tensors.compressors.base import compress_module
    from compressed_tensors.quantization import initialize_module_for_quantization
    from compressed_tensors.quantization.utils import calculate_qparams

    assert how.weights is not None
    rows, columns = weight.shape
    layer: Any = torch.nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    initialize_module_for_quantization(layer, how.model_copy(deep=True), force_zero_point=False)
    groups = weight.float().reshape(rows, -1, how.weights.group_size or columns)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), how.weights)
    layer.weight_scale.data.copy_(scale.to(kept))
    compress_module(layer)
    stored = layer.state_dict() | {"weight_scale": layer.weight_scale.data.to(kept)}
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def require_finite(name: str, tensor: torch.Tensor, kept: torch.dtype) -> None:
    """
    Raises:
        DataError: The tensor holds what is no number, or is none in the dtype that scales and unrounded weights have.
    """
    if tensor.is_floating_point() and not bool(tensor.to(kept).isfinite().all()):
        dtype = str(kept).removeprefix("torch.")
        wider = "" if dtype == "bfloat16" else ", or are they too large for it: a scheme of --dtype bfloat16"
        raise DataError(f"{name} holds weights that are not finite in {dtype}: is the checkpoint damaged{wider}?")


def shapes_in(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, by name.

    Raises:
        DataError: A file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise DataError(f"{file} cannot be read: {error}. Fetch it again") from error
    return shapes


def half_of(config: Mapping[str, Any]) -> str:
    """The dtype of a model, but bfloat16 in the place of float32: kernels for few bits compute in 16."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return "bfloat16" if dtype == "float32" else dtype


def _how(scheme: Scheme, group_size: int | None) -> QuantizationScheme:
    from compressed_tensors.quantization import preset_name_to_scheme

    assert scheme.preset is not None
    how = preset_name_to_scheme(scheme.preset, ["Linear"])
    if group_size is not None and how.weights is not None:
        how.weights.group_size = group_size
    return how


def _write_config(
    directory: Path,
    config: dict[str, Any],
    dtype: str,
    scheme: Scheme,
    how: QuantizationScheme,
    ignored: tuple[str, ...],
) -> None:
    """As `ModelCompressor.update_config` of compressed-tensors does, which needs the whole model."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    said = QuantizationConfig(
        config_groups={"group_0": how.model_copy(update={"format": scheme.file_format})},
        ignore=list(ignored),
        format=scheme.file_format,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    quantization = {"quant_method": "compressed-tensors", "version": compressed_tensors.__version__}
    quantization |= said.model_dump(mode="json", exclude={"quant_method"})
    for fields in (config, *(config[key] for key in ("text_config",) if isinstance(config.get(key), dict))):
        fields |= {"dtype": dtype, "torch_dtype": dtype}
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
