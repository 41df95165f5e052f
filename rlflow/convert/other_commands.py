"""ms-swift's commands that do not train, as command lines of rlflow: one table."""

from __future__ import annotations

import shlex
from typing import Any

from rlflow.convert.commands import Invocation
from rlflow.convert.given import Note, flags_of, shown
from rlflow.recipe.foreign.rows import as_list

_MODEL = {
    "infer_backend": "--engine",
    "torch_dtype": "--dtype",
    "max_batch_size": "--max-num-seqs",
    "vllm_max_num_seqs": "--max-num-seqs",
    "vllm_max_model_len": "--max-model-len",
    "vllm_tensor_parallel_size": "--tensor-parallel-size",
    "vllm_gpu_memory_utilization": "--gpu-memory-fraction",
}
"""How the model is held."""
_SAMPLING = {
    **_MODEL,
    "system": "--system",
    "max_new_tokens": "--max-new-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "seed": "--seed",
}
COMMANDS: dict[str, tuple[str, dict[str, str]]] = {
    "infer": (
        "infer",
        {**_SAMPLING, "val_dataset": "--data", "result_path": "--output", "val_dataset_sample": "--rows"},
    ),
    "app": ("infer", _SAMPLING),
    "deploy": (
        "serve",
        {
            "host": "--host",
            "port": "--port",
            "api_key": "--token",
            "adapters": "--adapters",
            "served_model_name": "--name",
            **_MODEL,
        },
    ),
    "rollout": ("", {}),
    "export": (
        "export",
        {
            "output_dir": "",
            "merge_lora": "--merge",
            "push_to_hub": "--push",
            "hub_private_repo": "--private",
            "torch_dtype": "--dtype",
        },
    ),
    "merge-lora": ("export", {"output_dir": ""}),
    "eval": (
        "eval",
        {
            **_MODEL,
            "eval_dataset": "--sets",
            "eval_limit": "--limit",
            "temperature": "--temperature",
            "eval_output_dir": "--output",
            "system": "--system",
        },
    ),
    "web-ui": ("ui", {"server_name": "--host", "server_port": "--port"}),
}
"""ms-swift's verb -> rlflow's command, and its flags -> ours; an empty one is an argument without a name."""
_READ_BESIDE = ("hub_model_id", "use_hf")
"""Flags that another one's value is made of."""
_UNNEEDED = {
    "stream": "answers are shown as they are written; in serve it is each request's",
    "load_args": "a run and its checkpoints have their settings with them",
    "load_data_args": "--data names what is to be answered",
    "verbose": "serve says nothing of single requests",
    "log_interval": "serve says nothing of single requests",
}
"""What is so without a flag, and why."""
_SCHEMES = {
    **{("fp8", bits): "fp8" for bits in (None, 8)},
    **{(method, bits): method.removesuffix("_v2") for method in ("awq", "gptq", "gptq_v2") for bits in (None, 4)},
    (None, 4): "w4a16",
    (None, 8): "int8",
}
"""ms-swift's ``quant_method`` and ``quant_bits`` of an export, as --quantize has them. bnb is loaded so, not stored."""
_ENGINES = {"pt": "torch", "transformers": "torch", "vllm": "vllm"}


def command_of(invocation: Invocation) -> tuple[str | None, tuple[Note, ...]]:
    """The command line, and what is not in it."""
    if invocation.framework not in ("swift", "megatron") or invocation.verb not in COMMANDS:
        return None, ()
    name, table = COMMANDS[invocation.verb]
    if not name:
        return None, (Note("unneeded", f"swift {invocation.verb}: rlflow run starts its engines itself"),)
    values, _ = flags_of(invocation.words, {})
    named = [
        values.pop(flag)
        for flag in ("adapters", "ckpt_dir")
        if flag in values and not (flag == "adapters" and "=" in str(values[flag]))
    ]
    model = values.pop("model", None) or values.pop("model_id_or_path", None)
    subject = as_list(named[0])[0] if named else model
    words: list[Any] = ["rlflow", name, *([] if name == "ui" else [subject or "RUN"])]
    if name == "ui":
        words.append("runs")
    notes: list[Note] = []
    behind = _quantize(values, notes) if name == "export" else []
    for flag, value in values.items():
        if flag not in table:
            if flag in _UNNEEDED:
                notes.append(Note("unneeded", f"--{flag} {shown(flag, value)}: {_UNNEEDED[flag]}"))
            elif flag not in _READ_BESIDE:
                notes.append(Note("missing", f"--{flag} {shown(flag, value)}"))
            continue
        behind += _option(flag, table[flag], value, values)
    if invocation.verb == "merge-lora":
        behind.append("--merge")
    return " ".join(shlex.quote(str(word)) for word in [*words, *behind]), tuple(notes)


def _quantize(values: dict[str, Any], notes: list[Note]) -> list[Any]:
    """The scheme that two flags name, and the texts to calibrate on; taken from the values."""
    given = {flag: values.pop(flag) for flag in ("quant_method", "quant_bits") if flag in values}
    texts = as_list(values.pop("dataset", []))
    if not given:
        notes.extend(Note("missing", f"--dataset {text}: nothing is quantised") for text in texts)
        return []
    bits = given.get("quant_bits")
    scheme = _SCHEMES.get((given.get("quant_method"), int(str(bits)) if str(bits).isdecimal() else bits))
    if scheme is None:
        notes.extend(Note("missing", f"--{flag} {shown(flag, value)}") for flag, value in given.items())
        return []
    notes.extend(Note("missing", f"--dataset {text}: --calibration is one file, join them") for text in texts[1:])
    # `name#rows` is some of a dataset's rows.
    calibration = ["--calibration", str(texts[0]).partition("#")[0]] if texts else []
    return ["--quantize", scheme, *calibration]


def _option(flag: str, option: str, value: Any, values: dict[str, Any]) -> list[Any]:
    match flag:
        case "merge_lora" | "hub_private_repo":
            return [option] if value == "true" else []
        case "push_to_hub":
            hub = "hf" if values.get("use_hf") == "true" else "modelscope"
            return [option, f"{hub}:{values.get('hub_model_id', 'ORGANISATION/NAME')}"] if value == "true" else []
        case "api_key":
            return [option, "TOKEN"]
        case "infer_backend":
            return [option, _ENGINES.get(value, "vllm")]
        case _:
            return [*([option] if option else []), *as_list(value)]
