"""A recipe's algorithm: the row that its name stands for, with what the recipe says instead.

Rows of one objective have the same blocks. A block of several kinds is of the row's kind until the recipe names another
one; then it has that kind's defaults, but for what all of its kinds have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from rlflow.recipe.algorithm_kinds import (
    AlgorithmBlock,
    ClassificationBlock,
    EmbeddingBlock,
    GenerativeRerankerBlock,
    KTOBlock,
    OnlineBlock,
    PairBlock,
    RerankerBlock,
    RewardModelBlock,
    SampleBlock,
    SFTBlock,
    UnknownBlock,
)
from rlflow.recipe.block import Block, blocks_in, kinds_in
from rlflow.recipe.presets import ALGORITHMS
from rlflow.recipe.yaml_source import Document, KeyPath, merge


def _objective(given: Any) -> str:
    name = given["name"] if isinstance(given, Mapping) and "name" in given else getattr(given, "name", None)
    return f"<{ALGORITHMS[name].objective}>" if isinstance(name, str) and name in ALGORITHMS else "<unknown>"


Algorithm = Annotated[
    Annotated[OnlineBlock, Tag("<policy>")]
    | Annotated[SFTBlock, Tag("<sft>")]
    | Annotated[SampleBlock, Tag("<none>")]
    | Annotated[PairBlock, Tag("<preference>")]
    | Annotated[KTOBlock, Tag("<kto>")]
    | Annotated[RewardModelBlock, Tag("<reward_model>")]
    | Annotated[ClassificationBlock, Tag("<classification>")]
    | Annotated[EmbeddingBlock, Tag("<embedding>")]
    | Annotated[RerankerBlock, Tag("<reranking>")]
    | Annotated[GenerativeRerankerBlock, Tag("<yes_no>")]
    | Annotated[UnknownBlock, Tag("<unknown>")],
    Discriminator(_objective),
]

BLOCKS: dict[str, type[AlgorithmBlock]] = {
    "policy": OnlineBlock,
    "sft": SFTBlock,
    "none": SampleBlock,
    "preference": PairBlock,
    "kto": KTOBlock,
    "reward_model": RewardModelBlock,
    "classification": ClassificationBlock,
    "embedding": EmbeddingBlock,
    "reranking": RerankerBlock,
    "yes_no": GenerativeRerankerBlock,
}
"""A row's ``objective`` -> what an algorithm of such a row has."""


def rows_of(block: type[AlgorithmBlock]) -> str:
    """The algorithms of a class of ``BLOCKS``, or what they are called together."""
    names = [name for name, row in ALGORITHMS.items() if BLOCKS[row.objective] is block]
    return ", ".join(names) if len(names) <= 4 else f"{ALGORITHMS[names[0]].family} algorithms"


_VALIDATOR: TypeAdapter[AlgorithmBlock] = TypeAdapter(Algorithm)


def algorithm_of(name: str, **options: Any) -> Any:
    """A row of the table with these options of its blocks.

    Raises:
        pydantic.ValidationError: There is no such option, or no such value.
    """
    return _VALIDATOR.validate_python(with_defaults({"name": name, **options}))


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of its algorithm, whose name the table has, on top of the row's defaults."""
    row = ALGORITHMS[given["name"]]
    kinds, defaults = kinds_in(BLOCKS[row.objective]), dict(row.defaults)
    for field, of_field in kinds.items():
        block = _block(given, field)
        if of_field.key in block and of_field.of(block) is not of_field.of(_block(defaults, field)):
            defaults[field] = {key: value for key, value in _block(defaults, field).items() if key in of_field.shared}
    merged = merge(defaults, given)
    for field, (key, names) in kinds.items():
        if isinstance(merged.get(field), dict):
            merged[field] = {key: next(iter(names)), **merged[field]}
    if _block(merged, "advantage").get("estimator") == "gae":
        merged = {"critic": {}, **merged}
    return merged


def without_other_kinds(document: Document, newer: Collection[KeyPath]) -> Document:
    """The document without the options that a newly named algorithm or kind does not have, unless they are new as well.

    Args:
        newer: Keys that were given on top of the others.
    """
    algorithm = _block(document.data, "algorithm")
    if algorithm.get("name") not in list(ALGORITHMS):
        return document
    kept = _fitting(algorithm, {path[1:] for path in newer if path[:1] == ("algorithm",)})
    return document.cut_to({**document.data, "algorithm": kept})


def _fitting(algorithm: Mapping[str, Any], newer: Collection[KeyPath]) -> dict[str, Any]:
    """``without_other_kinds`` of an algorithm whose name the table has. What nothing has stays, to be reported."""
    row = ALGORITHMS[algorithm["name"]]
    block, is_named = BLOCKS[row.objective], ("name",) in newer
    kept = _without(algorithm, block, BLOCKS.values(), newer, ()) if is_named else dict(algorithm)
    for field in kept.keys() & block.model_fields.keys():
        given, kinds = _block(kept, field), kinds_in(block).get(field)
        if kinds is not None:
            kind = kinds.of({**_block(row.defaults, field), **given})
        else:
            kind = next(blocks_in(block.model_fields[field].annotation), None)
        if given and kind is not None and (is_named or (kinds is not None and (field, kinds.key) in newer)):
            owners = (owner.model_fields[field].annotation for owner in BLOCKS.values() if field in owner.model_fields)
            others = [other for annotation in owners for other in blocks_in(annotation)]
            kept[field] = _without(given, kind, others, newer, (field,))
    estimator = {**_block(row.defaults, "advantage"), **_block(kept, "advantage")}.get("estimator")
    newly_without = estimator != "gae" and (is_named or ("advantage", "estimator") in newer)
    if newly_without and ("critic",) not in newer:
        kept.pop("critic", None)
    return kept


def _without(
    given: Mapping[str, Any],
    kind: type[Block],
    others: Iterable[type[Block]],
    newer: Collection[KeyPath],
    path: KeyPath,
) -> dict[str, Any]:
    """What was given at ``path`` without the keys of ``others`` that ``kind`` does not have, but for newer ones."""
    foreign = {key for other in others for key in other.model_fields} - kind.model_fields.keys()
    return {key: value for key, value in given.items() if key not in foreign or (*path, key) in newer}


def of_this_version(data: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe as this version writes it: older ones gave every algorithm the options of all of them."""
    algorithm = dict(_block(data, "algorithm"))
    if not {"critic", "preference"} <= algorithm.keys() or algorithm.get("name") not in list(ALGORITHMS):
        return data
    # SAPO's options were called sapo_tau_positive and sapo_tau_negative.
    algorithm["loss"] = {key.removeprefix("sapo_"): value for key, value in _block(algorithm, "loss").items()}
    return {**data, "algorithm": _fitting(algorithm, {("name",)})}


def _block(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A block as it was given, empty when it was not."""
    return data[name] if name in data and isinstance(data[name], dict) else {}
