"""TRL as an oracle of numbers needs no vLLM, whose import takes seconds."""

from importlib import import_module

import_module("trl.import_utils").is_vllm_available = lambda min_version=None: False  # type: ignore[attr-defined]
