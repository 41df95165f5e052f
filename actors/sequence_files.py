"""What lies beside the weights of a model that says something of sequences, so that others read it as it was trained.

tokenizer           pads with a token of its own, puts texts and pairs together as training did
classifier          config.json: id2label, problem_type (transformers' Trainer and pipelines)
reranker            sentence_bert_config.json, modules.json: sentence-transformers' CrossEncoder
embedding           modules.json, 1_Pooling, 2_Normalize: SentenceTransformer
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlflow.data.sequence_format import answer_ids, format_of, reading_texts
from rlflow.data.tokenizer import give_own_pad, load_tokenizer, save_tokenizer
from rlflow.recipe import AlgorithmBlock, EmbeddingBlock, GenerativeRerankerBlock, ModelBlock, RerankerBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_VERSION = {"sentence_transformers": "6.2.0"}
_MODULES = {
    "": "sentence_transformers.base.modules.transformer.Transformer",
    "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "2_Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "1_LogitScore": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
}
"""Folder of a module -> its class."""


def pad_model(model: PreTrainedModel, block: ModelBlock) -> PreTrainedTokenizerFast:
    """Gives a model a padding token that ends no conversation. Returns the tokenizer that pads with it.

    Raises:
        ValueError: There is none, and an adapter leaves the model's embeddings as they are.
    """
    tokenizer = load_tokenizer(block)
    pad, config = give_own_pad(tokenizer, block), model.config.get_text_config()
    if pad >= config.vocab_size:
        if block.adapter is not None:
            raise ValueError(
                "the tokenizer has no padding token that ends no text, and an adapter cannot add one to the model: "
                "save the base with one, or train without model.adapter"
            )
        model.resize_token_embeddings(pad + 1, mean_resizing=False)
    # By it transformers' classifiers find a sequence's last token, which is the one that is scored here.
    config.pad_token_id = pad
    return tokenizer


def write_readers(
    directory: Path, tokenizer: PreTrainedTokenizerFast, block: ModelBlock, algorithm: AlgorithmBlock
) -> None:
    """Writes the tokenizer, and what sentence-transformers reads.

    Args:
        tokenizer: Of `pad_model`.
    """
    if not algorithm.learning.held_out:
        save_tokenizer(tokenizer, directory)
        return
    save_tokenizer(reading_texts(tokenizer, format_of(tokenizer, algorithm)), directory)
    if block.adapter is not None:
        return  # PEFT reads it; what sentence-transformers reads comes with the merged model
    if isinstance(algorithm, EmbeddingBlock):
        _write_embedder(directory, block, algorithm)
    elif isinstance(algorithm, RerankerBlock):
        _write_cross_encoder(directory, tokenizer, algorithm)


def _write_embedder(directory: Path, block: ModelBlock, algorithm: EmbeddingBlock) -> None:
    from transformers import AutoConfig

    assert block.path is not None
    options: dict[str, Any] = {"revision": block.revision, "trust_remote_code": block.trust_remote_code}
    size = AutoConfig.from_pretrained(block.path, **options).get_text_config().hidden_size
    pooling = {"embedding_dimension": size, "pooling_mode": "lasttoken", "include_prompt": True}
    names = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    _write_modules(directory, {"": None, "1_Pooling": pooling, "2_Normalize": names})
    prompts = {"query": algorithm.embedding.query_prompt, "document": ""}
    settings = {"model_type": "SentenceTransformer", "prompts": prompts, "similarity_fn_name": "cosine"}
    _write(directory / "config_sentence_transformers.json", {"__version__": _VERSION, **settings})
    _write_transformer(directory, "feature-extraction", "last_hidden_state", "token_embeddings")


def _write_cross_encoder(directory: Path, tokenizer: PreTrainedTokenizerFast, algorithm: RerankerBlock) -> None:
    if isinstance(algorithm, GenerativeRerankerBlock):
        yes, no = answer_ids(tokenizer, algorithm.answers)
        head = {"true_token_id": yes, "false_token_id": no, "module_input_name": "causal_logits"}
        _write_modules(directory, {"": None, "1_LogitScore": head})
        _write_transformer(directory, "text-generation", "logits", "causal_logits")
    else:
        _write_modules(directory, {"": None})
        _write_transformer(directory, "sequence-classification", "logits", "scores")
    sigmoid = "torch.nn.modules.activation.Sigmoid"
    settings = {"model_type": "CrossEncoder", "prompts": {}, "activation_fn": sigmoid}
    _write(directory / "config_sentence_transformers.json", {"__version__": _VERSION, **settings})


def _write_modules(directory: Path, modules: dict[str, dict[str, Any] | None]) -> None:
    """Args: modules: Folder -> what its config.json says; None of the transformer, which has one."""
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": _MODULES[path]} for index, path in enumerate(modules)
    ]
    _write(directory / "modules.json", entries)
    for path, config in modules.items():
        if config is not None:
            (directory / path).mkdir(exist_ok=True)
            _write(directory / path / "config.json", config)


def _write_transformer(directory: Path, task: str, output: str, name: str) -> None:
    """That texts are read as texts: otherwise a chat template beside them would be put around each."""
    reads = {"text": {"method": "forward", "method_output_name": output}}
    _write(
        directory / "sentence_bert_config.json",
        {"transformer_task": task, "modality_config": reads, "module_output_name": name},
    )


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
