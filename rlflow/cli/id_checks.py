"""Whether every id and every position that a recipe can bring about is one that its models know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlflow.cli.sequence_checks import config_of, resolved
from rlflow.data.errors import DataError
from rlflow.data.vocabulary import Vocabulary, difference, read_vocabulary, tokens_without_row
from rlflow.positions import longest_sequences, position_limit
from rlflow.recipe import ModelBlock, Recipe
from rlflow.recipe.distill_blocks import DivergenceDistillBlock
from rlflow.rewards.reward_model import ids_problem

Found = Iterator[tuple[str, str]]
"""(dotted key, what is wrong with its value and what to do)."""
_PREFIX = "model.path: "
"""Of what is wrong with any model's tokenizer."""


def in_ids(recipe: Recipe, to_come: Mapping[str, Recipe]) -> Found:
    """Of the policy, and of the models that are given its ids: reference, critic and teacher.

    Args:
        to_come: The directory that each earlier stage will write, and the stage.
    """
    try:
        vocabulary = _vocabulary(recipe.model, to_come)
    except (ValueError, DataError) as error:
        yield "model.path", str(error).removeprefix(_PREFIX)
        return
    yield from _in_rows("model.path", recipe.model, vocabulary, to_come)
    yield from _in_positions("model.path", recipe.model, recipe, to_come)
    yield from _in_most_probable(recipe, vocabulary)
    yield from _in_trained_tokens(recipe.model, to_come)
    for key, path in _others(recipe).items():
        other = ModelBlock(path=path)
        yield from _in_positions(key, other, recipe, to_come)
        try:
            yield from _in_tokenizer(key, other, recipe.model, vocabulary, to_come)
        except (ValueError, DataError) as error:
            yield key, str(error).removeprefix(_PREFIX)


def _in_most_probable(recipe: Recipe, vocabulary: Vocabulary | None) -> Found:
    """Of a teacher's most probable tokens and all others as one: there must be others."""
    distill = recipe.online.distill if recipe.needs_teacher else None
    top_k = distill.top_k if isinstance(distill, DivergenceDistillBlock) else None
    if vocabulary is not None and top_k is not None and top_k >= len(vocabulary):
        whole = "" if recipe.teacher.url is not None else ", or leave it out to compare the whole vocabulary"
        yield (
            "algorithm.distill.top_k",
            f"is {top_k}, and the tokenizer of {_named(recipe.model)} has {len(vocabulary)} tokens: lower it{whole}",
        )


def _in_trained_tokens(model: ModelBlock, to_come: Mapping[str, Recipe]) -> Found:
    """Of an adapter on rows of the embedding."""
    fields = model.adapter.peft if model.adapter is not None else None
    given, num_rows = (fields or {}).get("token_indices"), _num_rows(model, to_come)
    ids = given if isinstance(given, list) else []
    beyond = [id for id in ids if num_rows is not None and isinstance(id, int) and id >= num_rows]
    if beyond:
        reason = f"{beyond[0]} is no row of {_named(model)}'s embedding, which has {num_rows}"
        yield "model.adapter.peft.token_indices", reason


def scorer_ids_problem(path: str, config: Mapping[str, Any], args: Mapping[str, Any]) -> str | None:
    """Of a reward model on this machine, which has a tokenizer of its own: as the rest of a sentence, or None.

    Args:
        config: Fields of its config.json.
        args: Of the reward.
    """
    given = args.get("max_tokens")
    try:
        return ids_problem(config, read_vocabulary(ModelBlock(path=path)), given if isinstance(given, int) else None)
    except (ValueError, DataError) as error:
        return f"has no tokenizer that can be read: {str(error).removeprefix(_PREFIX)}"


def _others(recipe: Recipe) -> dict[str, str]:
    """Key -> path of the models beside the policy that score its ids."""
    given = {
        "reference.path": recipe.reference.path if recipe.needs_reference else None,
        "algorithm.critic.path": None if recipe.critic is None else recipe.critic.path,
        "teacher.path": recipe.teacher.path if recipe.needs_teacher else None,
    }
    return {key: path for key, path in given.items() if path is not None and path != recipe.model.path}


def _in_tokenizer(
    key: str, other: ModelBlock, policy: ModelBlock, vocabulary: Vocabulary | None, to_come: Mapping[str, Recipe]
) -> Found:
    """Where the other has no tokenizer beside it, its embedding at least has a row for each of the policy's tokens."""
    theirs = _vocabulary(other, to_come)
    if vocabulary is not None and theirs is not None and (problem := difference(vocabulary, theirs)):
        yield (
            key,
            f"{other.path} has another tokenizer than {_named(policy)}, whose ids it is to score: {problem}. Name a "
            "model of the same tokenizer",
        )
        return
    yield from _in_rows(key, other, vocabulary, to_come)


def _in_rows(key: str, model: ModelBlock, vocabulary: Vocabulary | None, to_come: Mapping[str, Recipe]) -> Found:
    num_rows = _num_rows(model, to_come)
    if vocabulary is None or num_rows is None:
        return
    if beyond := tokens_without_row(vocabulary, num_rows):
        yield (
            key,
            f"{_named(model)} has an embedding of {num_rows} rows and gets ids up to {vocabulary[beyond[-1]]}: "
            f"{len(beyond)} of the tokenizer's {len(vocabulary)} tokens have no row, such as {beyond[0]!r}. Save the "
            "model after model.resize_token_embeddings(len(tokenizer)), or put the tokenizer that it was made with "
            "beside it",
        )


def _num_rows(model: ModelBlock, to_come: Mapping[str, Recipe]) -> int | None:
    """Of the embedding. A new model gets as many as it has tokens."""
    if resolved(model, to_come).architecture is not None:
        return None
    config = config_of(model, to_come)
    text = config and config.get("text_config", config)
    size = text and text.get("vocab_size")
    return size if isinstance(size, int) else None


def _in_positions(key: str, model: ModelBlock, recipe: Recipe, to_come: Mapping[str, Recipe]) -> Found:
    config = config_of(model, to_come)
    if config is None:
        return
    limit = position_limit(config)
    for keys, length in longest_sequences(recipe).items():
        if limit is not None and length > limit:
            of_model = "" if key == "model.path" else f" ({key})"
            _, plus, last = keys.rpartition(" + ")
            remedy = f"lower {'one of them' if plus else 'it'}, or name a model that takes longer ones"
            yield (
                last,
                f"sequences may have {length} tokens ({keys}), and {_named(model)}{of_model} takes {limit}: {remedy}",
            )


def _vocabulary(model: ModelBlock, to_come: Mapping[str, Recipe]) -> Vocabulary | None:
    # Where even the config is not to be had, the hub is not asked again.
    return None if config_of(model, to_come) is None else read_vocabulary(resolved(model, to_come))


def _named(model: ModelBlock) -> str:
    return model.path or "the new model"
