"""What answers are written with: a policy, its tokenizer and template, its engine, adapters beside it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlflow.data.audios import NO_WRITER
from rlflow.data.chat import Chat
from rlflow.data.errors import DataError
from rlflow.data.image_processor import ImageProcessor, load_image_processor
from rlflow.data.tokenizer import generation_settings, load_tokenizer, stop_token_ids
from rlflow.data.vocabulary import ids_without_token, placeholder_ids
from rlflow.model_source import ModelSource
from rlflow.recipe import AdapterBlock, ModelBlock
from rlflow.recipe.adapter_files import is_adapter, read_config, same_model
from rlflow.recipe.hub_files import hub_config
from rlflow.recipe.local_paths import is_hub_id
from rlflow.serving.sampling import Sampling, defaults_of
from rlflow.serving.text import hidden_ids
from rlflow.tracking.card_snippets import is_reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rlflow.actors.rollout_engines.engine import RolloutEngine
    from rlflow.serving.streams import Streams

EngineName = Literal["torch", "vllm"]
UNBOUNDED = 1 << 20
"""Tokens of a model whose config names no longest text."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is held."""

    dtype: str = "auto"
    """As torch spells it; auto: the one that its config names."""
    max_model_len: int | None = None
    """Longest text in tokens, prompt and answer; the model's own when None."""
    max_num_seqs: int = 64
    """Answers that are written at a time."""
    max_pixels: int | None = None
    """Width times height: larger pictures are scaled down; as the run's recipe says when None."""
    chat_template: str | None = None
    """A Jinja template or a file; the tokenizer's when None."""
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    """vLLM: GPUs that the model is split over."""
    gpu_memory_fraction: float = 0.85
    """vLLM: of a GPU's memory."""
    kv_cache_gib: float = 2.0
    """vLLM on a CPU."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A policy that is found and read, but for its weights."""

    source: ModelSource
    base: ModelBlock
    """The model itself, of an adapter its base, with the dtype that it is held in."""
    tokenizer: PreTrainedTokenizerFast
    chat: Chat
    has_template: bool
    """Whether the tokenizer has a chat template: other models go on from texts alone."""
    hidden: frozenset[int]
    """Tokens that are not shown."""
    stop_token_ids: tuple[int, ...]
    context: int
    """Tokens of the longest text."""
    vocabulary: int
    """Rows of its embedding."""
    defaults: Sampling
    """As the run drew answers, or the model's authors advise."""
    unwritten: np.ndarray
    """int64: ids that no answer has: those of no token, and those that stand for a picture."""

    @property
    def vision(self) -> ImageProcessor | None:
        """What reads its pictures; None of a model that takes text alone."""
        return self.chat.vision

    @property
    def base_name(self) -> str:
        """What the base is called beside adapters."""
        assert self.base.path is not None
        name = Path(self.base.path).name
        return name if self.source.is_adapter and name != self.source.name else f"{self.source.name}-base"


def choose_engine(name: str) -> EngineName:
    """``auto`` is vllm where it is installed and there is a GPU.

    Raises:
        DataError: vllm is asked for, and is not installed.
    """
    if name == "vllm" and find_spec("vllm") is None:
        raise DataError("--engine vllm: vLLM is not installed. Install rlflow[gpu] or rlflow[cpu], or --engine torch")
    if name != "auto":
        return "vllm" if name == "vllm" else "torch"
    import torch

    return "vllm" if find_spec("vllm") is not None and torch.cuda.is_available() else "torch"


def read_model(source: ModelSource, settings: Settings) -> ServedModel:
    """Everything but the weights.

    Raises:
        DataError: It is no policy, its files cannot be read, or ``max_model_len`` is beyond what it reads.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from rlflow.actors.vision import hears, sees

    refuse_reward_model(source)
    path = source.base if source.is_adapter else source.path
    if path is None:
        raise DataError(f"{source.path} does not say which model it is an adapter of: correct its adapter_config.json")
    try:
        if not Path(path).exists() and is_hub_id(path):
            hub_config(path, None)  # a hub that is not there is found by one request, not by the library's many
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    except StrictDataclassError as error:
        raise DataError(f"{path}/config.json: {' '.join(str(error).split())}: correct it, or fetch it again") from error
    except (OSError, ValueError) as error:
        said = str(error).partition("\n")[0].rstrip(". ")
        raise DataError(
            f"{path}: there is no model that can be read: {said}. Name a directory that holds one"
        ) from error
    if hears(config):
        raise DataError(f"{path} hears, and {NO_WRITER}")
    text = config.get_text_config()
    context = _context(text, settings.max_model_len, path)
    has_tokenizer = source.directory is not None and any((source.directory / f).is_file() for f in _TOKENIZER_FILES)
    own = ModelBlock(
        path=source.path if has_tokenizer or not source.is_adapter else path,
        chat_template=settings.chat_template,
        trust_remote_code=settings.trust_remote_code,
    )
    tokenizer = load_tokenizer(own)
    base = ModelBlock(path=path, trust_remote_code=settings.trust_remote_code)
    advice = generation_settings(str(own.path), None) or generation_settings(path, None)
    day = None if source.recipe is None else source.recipe.data.template_date
    dtype = settings.dtype if settings.dtype != "auto" else str(config.dtype or "float32").removeprefix("torch.")
    max_pixels = settings.max_pixels
    if max_pixels is None and source.recipe is not None:
        max_pixels = source.recipe.model.max_pixels
    vision = load_image_processor(base.model_copy(update={"max_pixels": max_pixels})) if sees(config) else None
    unwritten = ids_without_token(tokenizer, text.vocab_size)
    return ServedModel(
        source=source,
        base=base.model_copy(update={"dtype": dtype}),
        tokenizer=tokenizer,
        chat=Chat(tokenizer, day, vision),
        has_template=bool(tokenizer.chat_template),
        hidden=hidden_ids(tokenizer),
        # An adapter of others often comes without a generation config: its base's holds, too.
        stop_token_ids=tuple(sorted({*stop_token_ids(tokenizer, own), *stop_token_ids(tokenizer, base)})),
        context=context,
        vocabulary=text.vocab_size,
        defaults=defaults_of(source.recipe, advice),
        unwritten=np.union1d(unwritten, placeholder_ids(config)).astype(np.int64),
    )


def refuse_reward_model(source: ModelSource) -> None:
    """
    Raises:
        DataError: It scores answers, and writes none.
    """
    recipe, directory = source.recipe, source.directory
    is_scorer = recipe is not None and recipe.algorithm.learning.head != "token"
    if directory is not None and is_adapter(directory):
        is_scorer |= read_config(directory).get("task_type") == "SEQ_CLS"
    elif directory is not None:
        is_scorer |= is_reward_model(directory)
    if recipe is not None and recipe.algorithm.learning.held_out:
        raise DataError(
            f"{source.path} is of {recipe.algorithm.name}: it says something of texts and writes none. `rlflow infer "
            f"{shlex.quote(source.path)} --data FILE --output FILE.jsonl` writes what it says; the "
            "recipe's evaluation measures it"
        )
    if is_scorer:
        raise DataError(
            f"{source.path} is a reward model: it scores answers and writes none. Name a policy; to score with it, "
            f"give a recipe the reward {{name: reward_model, args: {{path: {source.path}}}}}"
        )


def open_streams(model: ServedModel, engine: EngineName, adapters: Mapping[str, Path], settings: Settings) -> Streams:
    """Loads the weights.

    Args:
        adapters: PEFT directories by the names of their models; with vLLM's engine in this process, the source's alone.

    Raises:
        DataError: They cannot be loaded, or the engine cannot run the model.
    """
    import torch

    from rlflow.actors.rollout_engines.stop_strings import StopStrings
    from rlflow.serving.streams import Streams

    num_threads = torch.get_num_threads()
    try:
        if engine == "vllm":
            opened: RolloutEngine = _vllm_engine(model, adapters, settings, num_threads)
            engines, use = dict.fromkeys(names_of(model, adapters)[-1:], opened), _use_nothing
            readers = {}
        else:
            from rlflow.serving.torch_models import torch_engines

            torch_models, use = torch_engines(model, adapters, settings)
            engines = dict(torch_models)
            readers = {name: one.prompt_logprobs for name, one in torch_models.items()}
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{model.source.path}: {error}") from error
    for one in engines.values():
        one.leave_out(model.unwritten)
    engines = {name: StopStrings(one, model.tokenizer) for name, one in engines.items()}
    return Streams(engines, use, partial(torch.set_num_threads, num_threads), readers)


def names_of(model: ServedModel, adapters: Iterable[str]) -> list[str]:
    """The names that a client may ask for: the model's own first, the base of an adapter, then the adapters.

    Raises:
        DataError: Two bear one name.
    """
    source = model.source
    names = [model.base_name, source.name, *adapters] if source.is_adapter else [source.name, *adapters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"--adapters: two models are called {twice[0]}: give the adapter another name, name=path")
    return names


def models_by_name(
    model: ServedModel, adapters: Mapping[str, ModelSource], settings: Settings
) -> dict[str, ServedModel]:
    """The model, the base where it is an adapter, and adapters beside it: each with the tokenizer, template, stop
    tokens and sampling that it was trained with.

    Raises:
        DataError: An adapter is none, or of another model, or two models bear one name.
    """
    names = names_of(model, adapters)
    found = {model.source.name: model}
    if model.source.is_adapter:
        path = str(model.base.path)
        where = (Path(path), None) if Path(path).is_dir() else (None, path)
        source = ModelSource(where[0], None, model.base_name, None, None, hub_id=where[1])
        found[model.base_name] = read_model(source, settings)
    for name, adapter in adapters.items():
        check_adapter(adapter, model)
        # Its base is where the model is, wherever the adapter's config looks for it.
        found[name] = read_model(replace(adapter, name=name, base=model.base.path), settings)
    return {name: found[name] for name in names}


def check_adapter(adapter: ModelSource, model: ServedModel) -> None:
    """
    Raises:
        DataError: It is no adapter, or of another model.
    """
    if not adapter.is_adapter:
        raise DataError(f"--adapters {adapter.path}: holds no adapter, a directory with adapter_config.json")
    base, path = adapter.base, model.base.path
    assert path is not None
    if base is not None and not same_model(base, path):
        raise DataError(
            f"--adapters {adapter.path}: is an adapter of {base}, and the model is {path}: name its own base"
        )


def adapters_of(model: ServedModel, given: Mapping[str, Path]) -> dict[str, Path]:
    """All adapters by their names, the source's among them."""
    own = {model.source.name: model.source.directory} if model.source.is_adapter else {}
    return {name: path for name, path in {**own, **given}.items() if path is not None}


def _context(config: Any, wanted: int | None, path: str) -> int:
    own = getattr(config, "max_position_embeddings", None) or UNBOUNDED
    if wanted is not None and wanted > own:
        raise DataError(f"--max-model-len {wanted}: {path} reads {own} tokens at most")
    return wanted or own


def _vllm_engine(
    model: ServedModel, adapters: Mapping[str, Path], settings: Settings, num_threads: int
) -> RolloutEngine:
    from rlflow.actors.rollout_engines.vllm_engine import VllmEngine

    all_adapters = list(adapters_of(model, adapters).values())
    if len(all_adapters) > 1:
        raise ValueError("with the vllm engine one adapter at a time is chatted with; `rlflow serve` serves several")
    adapted = None
    if all_adapters:
        adapted = model.base.model_copy(update={"adapter": AdapterBlock(path=str(all_adapters[0]))})
    assert model.base.path is not None
    return VllmEngine(
        model.base.path,
        dtype=model.base.dtype,
        max_model_len=model.context,
        max_num_seqs=settings.max_num_seqs,
        seed=0,
        gpu_memory_fraction=settings.gpu_memory_fraction,
        kv_cache_gib=settings.kv_cache_gib,
        tensor_parallel_size=settings.tensor_parallel_size,
        trust_remote_code=settings.trust_remote_code,
        log_path=None,
        num_threads=num_threads,
        adapted=adapted,
        is_whole=True,
    )


def _use_nothing(name: str) -> None:
    """There is one engine."""
