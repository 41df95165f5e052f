"""ms-swift's `swift sample`: the flags of SamplingArguments that are its own, and those of the model and the data."""

from __future__ import annotations

from typing import Any

from rlflow.recipe.foreign.rows import Table, each, fold, key, missing, unneeded


def _top_k(value: Any) -> int:
    """-1 keeps every token there."""
    return max(0, int(value))


SAMPLE: Table = {
    "model": key("model.path", read=str),
    "model_id_or_path": key("model.path", read=str),
    "adapters": fold("model.adapter.path"),
    "torch_dtype": key("model.dtype", read=lambda name: str(name).removeprefix("torch.")),
    "dataset": fold("data.train"),
    "columns": fold("data.train.columns"),
    "system": key("data.system", read=str),
    "max_length": key("data.max_prompt_tokens"),
    "data_seed": key("run.seed"),
    "seed": key("run.seed", default=42),
    "sampler_type": fold("algorithm.name", default="sample"),
    "sampler_engine": fold("rollout.engine", default="transformers"),
    "num_return_sequences": key("algorithm.group_size", default=64),
    "n_best_to_keep": fold("algorithm.keep.at_most", default=5),
    "orm_model": fold("rewards"),
    "prm_model": fold("rewards"),
    "prm_threshold": fold("algorithm.keep.where", default=0.0),
    "easy_query_threshold": missing("prompts that are easy are kept", name="algorithm.keep.at_least"),
    "max_new_tokens": key("rollout.max_new_tokens", default=2048),
    "temperature": key("rollout.temperature", default=1.0, read=float),
    "top_p": key("rollout.top_p", read=float),
    "top_k": key("rollout.top_k", read=_top_k),
    "repetition_penalty": key("sampling.repetition_penalty", read=float),
    "vllm_gpu_memory_utilization": key("rollout.gpu_memory_fraction"),
    "vllm_tensor_parallel_size": key("rollout.tensor_parallel_size"),
    "engine_kwargs": missing("options of an engine are keys of rollout", name="rollout"),
    "output_dir": key("run.output_dir", read=str),
    **each("output_file file_prefix file_suffix", unneeded("the rows are in final/rows.jsonl", "run.output_dir")),
    **each("override_exist_file resume", unneeded("rlflow run --resume goes on, and else an earlier run moves aside")),
    **each(
        "num_sampling_batch_size num_sampling_per_gpu_batch_size num_sampling_batches num_sampling_per_gpu_batches",
        unneeded("workers take prompts as they have room; a step is a file", "data.prompts_per_step"),
    ),
    "data_range": missing("take another --dataset for each part"),
    "cache_files": missing("answers that were sampled before are data already"),
    **each(
        "rollout_depth rollout_start_depth max_iterations process_reward_rate exploration_rate",
        missing("answers are drawn, and no tree is searched"),
    ),
    **each("api_key base_url", fold("rollout_server.urls")),
    "use_hf": unneeded("ids are the Hugging Face hub's"),
}
