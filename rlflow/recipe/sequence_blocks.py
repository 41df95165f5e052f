"""What is said of whole sequences: the blocks of classification, embedding and reranking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rlflow.recipe.block import Block, Conflict, PositiveFloat, PositiveInt

INSTRUCTION = "Given a query, decide whether the document answers it."


class ProblemBlock(Block):
    """What every problem has."""

    problem: str

    @property
    def num_outputs(self) -> int:
        """Numbers that the head puts out."""
        raise NotImplementedError


class ClassesBlock(ProblemBlock):
    problem: Literal["single_label", "multi_label"] = "single_label"
    """Each text has one class (softmax), or any number of them (a sigmoid each)."""
    labels: list[str] | None = None
    """Names of the classes, in the order of their ids; absent: those that the rows of data.train name, sorted, or of
    whole numbers all up to the largest. They go into config.json's id2label."""

    @property
    def num_outputs(self) -> int:
        assert self.labels is not None, "the names of the classes are pinned before anything starts"
        return len(self.labels)

    def conflicts(self) -> Iterator[Conflict]:
        if self.labels is None:
            return
        if len(self.labels) < (2 if self.problem == "single_label" else 1):
            yield Conflict(("labels",), "names too few classes to choose among: name two or more")
        if twice := [name for name, count in Counter(self.labels).items() if count > 1]:
            yield Conflict(("labels",), f"names {twice[0]} twice: give each class a name of its own")


class RegressionBlock(ProblemBlock):
    problem: Literal["regression"]
    """A text has a number, or several (squared error)."""
    targets: PositiveInt = 1
    """Numbers of a text."""

    @property
    def num_outputs(self) -> int:
        return self.targets


Problem = ClassesBlock | RegressionBlock


class EmbeddingLossBlock(Block):
    """What every loss of embeddings has."""

    loss: str
    matryoshka_dims: list[PositiveInt] = Field(default_factory=list)
    """Lengths to which embeddings may be cut later, e.g. [256, 128, 64]: the loss is the sum over the whole embedding
    and these (arXiv 2205.13147, eq. 1)."""
    query_prompt: str = ""
    """Text put before the first text of a row (anchor, sentence1, messages); sentence-transformers' prompt `query`."""

    def conflicts(self) -> Iterator[Conflict]:
        if len(set(self.matryoshka_dims)) < len(self.matryoshka_dims):
            yield Conflict(("matryoshka_dims",), "names a length twice: name each once")


class InfoNCEBlock(EmbeddingLossBlock):
    loss: Literal["infonce"] = "infonce"
    """Cross-entropy of the positive among the negatives, by cosine similarity (arXiv 1807.03748, eq. 4)."""
    temperature: PositiveFloat = 0.05
    """What similarities are divided by; ms-swift's default is 0.1."""
    in_batch_negatives: bool = True
    """The documents of the step's other rows are negatives too, but for texts that are among a row's positives."""


class ScoredPairBlock(EmbeddingLossBlock):
    loss: Literal["cosine_similarity"]
    """Squared error of the cosine similarity of two texts against their score."""


class ContrastiveBlock(EmbeddingLossBlock):
    loss: Literal["contrastive", "online_contrastive"]
    """Related texts near each other, others at least margin apart (Hadsell et al. 2006, eq. 4); online: of the step's
    pairs those that lie worse than the best of the other kind."""
    margin: PositiveFloat = 0.5
    """Cosine distance up to which unrelated texts are pushed apart."""


EmbeddingLoss = InfoNCEBlock | ScoredPairBlock | ContrastiveBlock


class RankingLossBlock(Block):
    """What every loss of a ranking has."""

    loss: str


class PlainRankingBlock(RankingLossBlock):
    loss: Literal["pointwise", "pairwise"] = "pointwise"
    """Binary cross-entropy of each document; or of each better one against each worse one of its query (RankNet,
    Burges et al. 2005, eq. 3)."""


class ListwiseBlock(RankingLossBlock):
    loss: Literal["listwise"]
    """Cross-entropy of each better document among those of its query that are worse."""
    temperature: PositiveFloat = 1.0
    """What scores are divided by."""


RankingLoss = PlainRankingBlock | ListwiseBlock


def _word(given: Any) -> Any:
    """YAML reads yes and no as true and false."""
    return {True: "yes", False: "no"}[given] if isinstance(given, bool) else given


Word = Annotated[str, BeforeValidator(_word)]


class YesNoBlock(Block):
    positive: Word = "yes"
    """What the model says of a document that is relevant: one token."""
    negative: Word = "no"
    """What it says of another."""
    instruction: str = INSTRUCTION
    """What relevance is, put before the query."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.positive == self.negative:
            yield Conflict(("positive", "negative"), "are the same word: give two")
