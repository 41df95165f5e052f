"""``--task_type`` of ms-swift: classifiers, embeddings and rerankers as a recipe's algorithm."""

from __future__ import annotations

import re

from rlflow.convert.given import Draft, Given

ALGORITHM_OF = {
    "seq_cls": "classification",
    "embedding": "embedding",
    "reranker": "reranker",
    "generative_reranker": "generative_reranker",
}
"""``task_type`` -> algorithm; causal_lm is what the command says."""
_EMBEDDING_LOSSES = ("infonce", "cosine_similarity", "contrastive", "online_contrastive")
_RANKING_LOSSES = {
    "pointwise_reranker": "pointwise",
    "listwise_reranker": "listwise",
    "reranker": "pointwise",
    "generative_reranker": "pointwise",
    "listwise_generative_reranker": "listwise",
}


def set_sequences(given: Given, draft: Draft, environment: dict[str, str]) -> None:
    """What belongs to the algorithm that ``--task_type`` names; variables that it reads are taken out."""
    match given["task_type"]:
        case "seq_cls":
            _set_classes(given, draft)
        case "embedding":
            _set_embedding(given, draft, environment)
        case "reranker" | "generative_reranker":
            _set_reranking(given, draft, environment)


def _set_classes(given: Given, draft: Draft) -> None:
    problem, count = str(given["problem_type"] or "").removesuffix("_classification"), given["num_labels"]
    if not problem and count == 1:
        problem = "regression"
    draft.set("algorithm.classification.problem", problem or "single_label", given.texts("problem_type", "num_labels"))
    if count and problem == "regression":
        draft.set("algorithm.classification.targets", count, given.text("num_labels"))
    elif count:
        labels = [str(label) for label in range(count)]
        draft.set("algorithm.classification.labels", labels, given.text("num_labels"))


def _set_embedding(given: Given, draft: Draft, environment: dict[str, str]) -> None:
    loss = given["loss_type"] or "infonce"
    if loss not in _EMBEDDING_LOSSES:
        draft.note("missing", f"{given.text('loss_type')}: there is no such loss of embeddings; infonce is written")
        loss = "infonce"
    draft.set("algorithm.embedding.loss", loss, given.text("loss_type"))
    if lengths := re.findall(r"\d+", str(given["mrl_dims"] or "")):
        draft.set("algorithm.embedding.matryoshka_dims", [int(one) for one in lengths], given.text("mrl_dims"))
    if loss != "infonce":
        return
    temperature = environment.pop("INFONCE_TEMPERATURE", None)
    why = "INFONCE_TEMPERATURE" if temperature else "(0.1, the default)"
    draft.set("algorithm.embedding.temperature", float(temperature or 0.1), why)
    if environment.pop("INFONCE_USE_BATCH", "true").lower() in ("false", "0"):
        draft.set("algorithm.embedding.in_batch_negatives", False, "INFONCE_USE_BATCH")
    for name in [name for name in environment if name.startswith("INFONCE_")]:
        value = environment.pop(name)
        draft.note("missing", f"{name}={value}: all negatives of a row count, and the same text is no negative")
    draft.note(
        "trap",
        "there the negatives are those of a micro-batch, here those of all data.prompts_per_step rows, whatever the "
        "micro-batches: the loss is higher and tells more apart",
    )


def _set_reranking(given: Given, draft: Draft, environment: dict[str, str]) -> None:
    given_loss = given["loss_type"] or "pointwise_reranker"
    if given_loss not in _RANKING_LOSSES:
        draft.note("missing", f"{given.text('loss_type')}: there is no such loss of rankings; pointwise is written")
    loss = _RANKING_LOSSES.get(given_loss, "pointwise")
    draft.set("algorithm.reranking.loss", loss, given.text("loss_type"))
    temperature = environment.pop("LISTWISE_RERANKER_TEMPERATURE", None)
    if loss == "listwise" and temperature:
        draft.set("algorithm.reranking.temperature", float(temperature), "LISTWISE_RERANKER_TEMPERATURE")
    for key, sign in (("positive", "POSITIVE"), ("negative", "NEGATIVE")):
        word = environment.pop(f"GENERATIVE_RERANKER_{sign}_TOKEN", None)
        if word and given["task_type"] == "generative_reranker":
            draft.set(f"algorithm.answers.{key}", word, f"GENERATIVE_RERANKER_{sign}_TOKEN")
    for name in ("MAX_POSITIVE_SAMPLES", "MAX_NEGATIVE_SAMPLES", "LISTWISE_RERANKER_MIN_GROUP_SIZE"):
        environment.pop(name, None)
    draft.note(
        "trap",
        "there a row gives 1 positive and 7 negatives (MAX_POSITIVE_SAMPLES, MAX_NEGATIVE_SAMPLES); here all of its "
        "documents count: leave out of the rows what is too much",
    )
