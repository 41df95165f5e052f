"""The policy's adapter in a vLLM engine: every version takes the place of the one before, under the same id.

vLLM keeps adapters by id, which the completions under way hold on to, and looks at their files again only when it is
told to load them in place.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from rlflow.actors import adapters
from rlflow.actors.rollout_engines.vllm_start import RANKS
from rlflow.actors.vision import language_model_class
from rlflow.recipe import ModelBlock
from rlflow.recipe.peft_methods import is_plain_lora, lora_kind

if TYPE_CHECKING:
    import vllm
    from vllm.lora.request import LoRARequest

_MEMORY = Path("/dev/shm")
_NAME, _ID = "policy", 1


class VllmAdapter:
    def __init__(self, block: ModelBlock) -> None:
        """Reads the config alone.

        Raises:
            ValueError: The adapter is one that vLLM does not generate with.
        """
        assert block.path is not None and block.adapter is not None
        self.given = block.adapter.path
        config = AutoConfig.from_pretrained(
            block.path, revision=block.revision, trust_remote_code=block.trust_remote_code
        )
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            self.model = language_model_class(config).from_config(config, trust_remote_code=block.trust_remote_code)
            adapters.inject(self.model, block, seed=0)
        self.shapes = {name: p.shape for name, p in adapters.adapter_parameters(self.model).items()}
        """What a trainer of this block sends."""
        config = adapters.config_of(self.model).to_dict()
        rank = adapters.largest_rank(self.model) if is_plain_lora(config) else 0
        if not rank or rank > RANKS[-1]:
            what = f"rank {rank}, more than {RANKS[-1]}" if rank else lora_kind(config)
            raise ValueError(f"model.adapter: vLLM does not generate with {what}: set rollout.engine: torch")
        self.options: dict[str, Any] = {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(size for size in RANKS if size >= rank),
            "revision": block.revision,
        }
        """Of vLLM's EngineArgs."""
        self.request: LoRARequest | None = None
        """Goes with every prompt; None before the first weights."""

    def load_given(self, llm: vllm.LLM) -> None:
        """Takes the adapter at the block's path as it is."""
        from vllm.lora.request import LoRARequest

        assert self.given is not None
        self.request = LoRARequest(_NAME, _ID, str(Path(self.given).resolve()))
        added = llm.llm_engine.add_lora(self.request)
        assert added and llm.llm_engine.list_loras() == {_ID}, "vLLM did not take the adapter"

    def load(self, llm: vllm.LLM, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Takes a new version: what is under way goes on with it, and the one before is gone."""
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as directory:
            adapters.write(Path(directory), self.model, tensors)
            added = llm.llm_engine.add_lora(LoRARequest(_NAME, _ID, directory, load_inplace=True))
            # Without load_inplace, which would read the files again at every step.
            self.request = LoRARequest(_NAME, _ID, directory)
        assert added and llm.llm_engine.list_loras() == {_ID}, "vLLM did not take the new adapter alone"
