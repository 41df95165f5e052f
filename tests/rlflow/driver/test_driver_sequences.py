"""Classifiers, rerankers and embedding models are read by others as they were trained: transformers and
sentence-transformers measure what the run itself measured on its held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_runs import RunRecipe, as_if_killed_after, metrics_of, same_weights
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rlflow.cli.main import main

WORDS = ("red apple", "green pear", "blue plum", "old car", "new bus", "slow train")
KINDS = ("fruit", "vehicle")


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Twelve of each kind of row, in the columns that people have."""
    rows = []
    for index in range(12):
        one, other, third = (WORDS[(index * step + shift) % 6] for step, shift in ((1, 0), (5, 2), (1, 3)))
        of_kind = KINDS[(index % 6) // 3]
        rows.append(
            {
                "classification": {"text": f"{one} {index}", "label": of_kind},
                "multi_label": {"text": f"{one} {index}", "label": [of_kind] if index % 4 else [*KINDS]},
                "regression": {"text": f"{one} {index}", "label": index / 7},
                "embedding": {
                    "messages": [{"role": "user", "content": f"what is {one} {index}"}],
                    "positive_messages": [[{"role": "user", "content": f"it is {one}"}]],
                    "negative_messages": [[{"role": "user", "content": f"it is no {third} {index}"}]] * (index % 2),
                },
                "pairs": {"anchor": f"what is {one} {index}", "positive": f"it is {index} {other}"},
                "sts": {"sentence1": one, "sentence2": f"{other} {index}", "score": index / 11},
                "reranker": {"query": f"{one} {index}", "positive": f"a {one}", "negative": [f"a {third}", "none"]},
            }[kind]
        )
    return rows


def recipe_of(model: Path, data: Path, name: str, **options: Any) -> dict[str, Any]:
    return {
        "algorithm": {"name": name, **options},
        "model": {"path": str(model)},
        "data": {"train": {"path": str(data)}, "prompts_per_step": 12, "max_tokens": 160},
        "evaluation": {"data": {"path": str(data)}},
        "trainer": {"learning_rate": 2.0e-3, "tokens_per_micro_batch": 160},
        "run": {"steps": 3},
    }


@pytest.fixture
def trained(tmp_path: Path, tiny_model_dir: Path, run_recipe: RunRecipe) -> Any:
    """Runs an algorithm on a kind of row; returns its ``final/``, what it measured last, and the rows."""

    def run(kind: str, name: str, **options: Any) -> tuple[Path, dict[str, float], list[dict[str, Any]]]:
        rows = rows_of(kind)
        data = tmp_path / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        directory = run_recipe(recipe_of(tiny_model_dir, data, name, **options))
        prefix = "eval/heldout/"
        measured = {
            key.removeprefix(prefix): value for key, value in metrics_of(directory)[-1].items() if prefix in key
        }
        return directory / "final", measured, rows

    return run


def logits_of(final: Path, texts: list[Any], side: str = "right") -> torch.Tensor:
    """Of a padded batch, by transformers alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(final, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(final, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def test_a_classifier_has_the_names_of_its_classes_and_transformers_measures_its_accuracy(trained: Any):
    final, measured, rows = trained("classification", "classification")
    config = json.loads((final / "config.json").read_text())
    assert config["id2label"] == {"0": "fruit", "1": "vehicle"} and config["label2id"] == {"fruit": 0, "vehicle": 1}
    assert config["problem_type"] == "single_label_classification"
    ids = torch.tensor([KINDS.index(row["label"]) for row in rows])
    for side in ("left", "right"):
        logits = logits_of(final, [row["text"] for row in rows], side)
        loss = torch.nn.functional.cross_entropy(logits, ids)
        assert measured["loss/classification"] == pytest.approx(loss.item(), abs=1e-5)
        assert measured["classification/accuracy"] == pytest.approx((logits.argmax(1) == ids).float().mean().item())
    classify: Any = pipeline("text-classification", str(final))
    said = [row["label"] for row in classify([row["text"] for row in rows])]
    assert np.mean([one == row["label"] for one, row in zip(said, rows, strict=True)]) == pytest.approx(
        measured["classification/accuracy"]
    )
    assert 0 < measured["classification/f1/fruit"] <= 1
    card = (final / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "Classifier trained with rlflow" in card


@pytest.mark.parametrize("problem", ["multi_label", "regression"])
def test_several_labels_and_numbers_have_the_loss_that_transformers_computes(trained: Any, problem: str):
    final, measured, rows = trained(problem, "classification", classification={"problem": problem})
    model = AutoModelForSequenceClassification.from_pretrained(final, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(final)([row["text"] for row in rows], padding=True, return_tensors="pt")
    if problem == "regression":
        labels = torch.tensor([row["label"] for row in rows])
    else:
        labels = torch.tensor([[float(kind in row["label"]) for kind in KINDS] for row in rows])
    with torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    assert measured["loss/classification"] == pytest.approx(loss.item(), abs=1e-5)


def test_sentence_transformers_has_the_embeddings_that_were_measured(trained: Any):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    block = {"query_prompt": "find: ", "temperature": 0.1, "matryoshka_dims": [8]}
    final, measured, rows = trained("embedding", "embedding", embedding=block)
    model = sentence_transformers.SentenceTransformer(str(final), device="cpu")
    queries, positives = ([row[key] for row in rows] for key in ("messages", "positive_messages"))
    texts = [messages[0]["content"] for messages in queries]
    anchors = model.encode(texts, prompt_name="query")
    documents = model.encode([messages[0][0]["content"] for messages in positives])
    assert np.allclose(np.linalg.norm(anchors, axis=1), 1, atol=1e-5)
    similarity = (anchors * documents).sum(axis=1).mean()
    assert measured["embedding/positive_similarity"] == pytest.approx(similarity, abs=1e-5)
    assert 'encode(["How do I reset it?"], prompt_name="query")' in (final / "README.md").read_text()
    assert np.allclose(anchors, model.encode([f"find: {text}" for text in texts]), atol=1e-6)


def test_the_loss_of_a_batch_is_the_one_that_sentence_transformers_computes_of_the_same_texts(trained: Any):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    final, measured, rows = trained("pairs", "embedding", embedding={"temperature": 0.1})
    model = sentence_transformers.SentenceTransformer(str(final), device="cpu")
    batch = [model.tokenize([row[name] for row in rows]) for name in ("anchor", "positive")]
    with torch.no_grad():
        theirs = MultipleNegativesRankingLoss(model, scale=10.0)(batch, torch.zeros(len(rows)))
    assert 0.01 < theirs.item() == pytest.approx(measured["loss/embedding"], abs=1e-4)


def test_sentence_transformers_measures_the_correlation_of_scored_pairs(trained: Any):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    final, measured, rows = trained("sts", "embedding", embedding={"loss": "cosine_similarity"})
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    sentences = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    evaluator = EmbeddingSimilarityEvaluator(*sentences, [row["score"] for row in rows])
    found = evaluator(sentence_transformers.SentenceTransformer(str(final), device="cpu"))
    for name in ("pearson", "spearman"):
        assert measured[f"sts/{name}"] == pytest.approx(found[f"{name}_cosine"], abs=1e-4)


@pytest.mark.parametrize("loss", ["pointwise", "pairwise", "listwise"])
def test_a_cross_encoder_has_the_scores_that_were_measured(trained: Any, loss: str):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    final, measured, rows = trained("reranker", "reranker", reranking={"loss": loss})
    pairs = [(row["query"], document) for row in rows for document in (row["positive"], *row["negative"])]
    model = sentence_transformers.CrossEncoder(str(final), device="cpu")
    scores = torch.tensor(model.predict(pairs, activation_fn=torch.nn.Identity()))
    assert torch.allclose(scores, logits_of(final, pairs)[:, 0], atol=1e-5)
    of_rows = scores.view(-1, 3)
    labels = torch.tensor([1.0, 0.0, 0.0]).expand_as(of_rows)
    expected = {
        "pointwise": torch.nn.functional.binary_cross_entropy_with_logits(of_rows, labels),
        "pairwise": torch.nn.functional.softplus(of_rows[:, 1:] - of_rows[:, :1]).mean(),
        "listwise": torch.nn.functional.cross_entropy(of_rows, torch.zeros(len(rows), dtype=torch.long)),
    }[loss]
    assert measured["loss/reranking"] == pytest.approx(expected.item(), abs=1e-5)
    first = (of_rows[:, :1] > of_rows[:, 1:]).all(dim=1).float().mean()
    assert measured["reranking/recall@1"] == pytest.approx(first.item())


@pytest.mark.slow
def test_a_generative_reranker_says_yes_as_likely_to_transformers_and_to_sentence_transformers(trained: Any):
    answers = {"positive": "y", "negative": "n"}
    final, measured, rows = trained("reranker", "generative_reranker", answers=answers)
    pairs = [(row["query"], document) for row in rows for document in (row["positive"], *row["negative"])]
    tokenizer: Any = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    yes, no = tokenizer.convert_tokens_to_ids(["y", "n"])
    scores = []
    for query, document in pairs:
        question = (
            "Given a query, decide whether the document answers it.\n"
            f"Query:\n{query}\nDocument:\n{document}\nAnswer y or n."
        )
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            logits = model(ids["input_ids"]).logits[0, -1]
        scores.append(float(logits[yes] - logits[no]))
    labels = torch.tensor([1.0, 0.0, 0.0] * len(rows))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(scores), labels)
    assert measured["loss/reranking"] == pytest.approx(loss.item(), abs=1e-5)
    sentence_transformers = pytest.importorskip("sentence_transformers")
    found = sentence_transformers.CrossEncoder(str(final), device="cpu").predict(
        pairs, activation_fn=torch.nn.Identity()
    )
    assert np.allclose(found, scores, atol=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(trained: Any, tmp_path: Path, run_recipe: RunRecipe):
    trained("classification", "classification")
    whole, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    assert recipe.is_file()
    settings = {"run": {"save_every": 1, "keep_checkpoints": 3}}
    import yaml

    given = yaml.safe_load(recipe.read_text())
    given["run"] |= settings["run"]
    again = run_recipe({**given, "run": {**given["run"], "output_dir": str(tmp_path / "again")}}, "again")
    assert same_weights(whole, again)
    as_if_killed_after(again, 1)
    run_recipe({**given, "run": {**given["run"], "output_dir": str(tmp_path / "again")}}, "again", resume=True)
    assert same_weights(whole, again)


def said_by(final: Path, rows: list[dict[str, Any]], tmp_path: Path) -> list[dict[str, Any]]:
    """What `rlflow infer` writes of rows."""
    data, output = tmp_path / "rows.jsonl", tmp_path / "said.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["infer", str(final.parent), "--data", str(data), "--output", str(output)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_infer_writes_classes_of_rows_without_labels(trained: Any, tmp_path: Path, capsys: Any):
    final, measured, rows = trained("classification", "classification")
    said = said_by(final, [{"text": row["text"], "id": index} for index, row in enumerate(rows)], tmp_path)
    assert [row["id"] for row in said] == list(range(12))
    right = [one["prediction"] == row["label"] for one, row in zip(said, rows, strict=True)]
    assert np.mean(right) == pytest.approx(measured["classification/accuracy"])
    chances = torch.softmax(logits_of(final, [rows[0]["text"]])[0], dim=0)
    assert list(said[0]["probabilities"].values()) == pytest.approx(chances.tolist(), abs=1e-5)
    assert main(["serve", str(final.parent), "--port", "0"]) == 2
    assert "is of classification: it says something of texts" in " ".join(capsys.readouterr().err.split())


def test_infer_ranks_documents_and_embeds_texts(trained: Any, tmp_path: Path):
    final, _, rows = trained("reranker", "reranker")
    documents = [rows[0]["positive"], *rows[0]["negative"]]
    (said,) = said_by(final, [{"query": rows[0]["query"], "documents": documents}], tmp_path)
    scores = logits_of(final, [(rows[0]["query"], document) for document in documents])[:, 0]
    assert said["scores"] == pytest.approx(scores.tolist(), abs=1e-5)
    assert said["ranking"] == scores.argsort(descending=True).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classification", "embedding", "reranker"])
def test_an_adapter_and_its_head_are_loaded_by_peft_with_the_numbers_that_were_measured(
    tmp_path: Path, tiny_model_dir: Path, run_recipe: RunRecipe, name: str
):
    rows = rows_of(name)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(tiny_model_dir, data, name)
    recipe["model"]["adapter"] = {"rank": 4, "kind": "dora" if name == "reranker" else "lora"}
    recipe["trainer"]["learning_rate"] = 2.0e-2
    directory = run_recipe(recipe)
    final = directory / "final"
    measured = metrics_of(directory)[-1]
    assert "--merge" in (card := (final / "README.md").read_text()) and "(path)" not in card
    tokenizer: Any = AutoTokenizer.from_pretrained(final)
    if name == "embedding":
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_model_dir), str(final)).eval()
        texts = [[row[key] for row in rows] for key in ("messages", "positive_messages")]
        sides = [[one[0]["content"] for one in texts[0]], [one[0][0]["content"] for one in texts[1]]]
        batches = [tokenizer(side, padding=True, padding_side="left", return_tensors="pt") for side in sides]
        with torch.no_grad():
            unit = [torch.nn.functional.normalize(model(**batch).last_hidden_state[:, -1], dim=1) for batch in batches]
        similarity = (unit[0] * unit[1]).sum(dim=1).mean().item()
        assert measured["eval/heldout/embedding/positive_similarity"] == pytest.approx(similarity, abs=1e-4)
        assert main(["export", str(directory), str(tmp_path / "merged"), "--merge"]) == 0
        sentence_transformers = pytest.importorskip("sentence_transformers")
        found = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(sides[0])
        assert np.allclose(found, unit[0].numpy(), atol=1e-4)
        return
    count = 2 if name == "classification" else 1
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=count)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, str(final)).eval()
    if name == "classification":
        inputs: Any = [row["text"] for row in rows]
    else:
        inputs = [(row["query"], document) for row in rows for document in (row["positive"], *row["negative"])]
    with torch.no_grad():
        logits = model(**tokenizer(inputs, padding=True, return_tensors="pt")).logits
    if name == "classification":
        ids = torch.tensor([KINDS.index(row["label"]) for row in rows])
        loss = torch.nn.functional.cross_entropy(logits, ids)
        said = said_by(final, [{"text": row["text"]} for row in rows], tmp_path)
        assert [KINDS.index(row["prediction"]) for row in said] == logits.argmax(dim=1).tolist()
        assert main(["export", str(directory), str(tmp_path / "merged"), "--merge"]) == 0
        assert torch.allclose(logits_of(tmp_path / "merged", inputs), logits, atol=1e-4)
        assert 'pipeline("text-classification", path)' in (tmp_path / "merged" / "README.md").read_text()
    else:
        labels = torch.tensor([1.0, 0.0, 0.0] * len(rows))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels)
    head = "classification" if name == "classification" else "reranking"
    assert measured[f"eval/heldout/loss/{head}"] == pytest.approx(loss.item(), abs=1e-4)
