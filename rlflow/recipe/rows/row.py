"""What a row of the algorithm table is: columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal[
    "online",
    "distillation",
    "sampling",
    "sft",
    "preferences",
    "reward_model",
    "classification",
    "embedding",
    "reranking",
]

Objective = Literal[
    "policy", "sft", "preference", "kto", "reward_model", "classification", "embedding", "reranking", "yes_no", "none"
]

Family = Literal["online", "sft", "preference", "sample"]
"""Which driver runs it."""

TASKS: dict[Task, str] = {
    "online": "learn from rollouts and their rewards (ref: a reference, critic: a value model, demos: demonstrations)",
    "distillation": "learn from a teacher",
    "sampling": "answer prompts, for the stages behind to learn from",
    "sft": "learn from demonstrations and plain text",
    "preferences": "learn from judged answers",
    "reward_model": "learn to judge answers",
    "classification": "learn labels or numbers of texts",
    "embedding": "learn vectors of texts",
    "reranking": "learn how well a text answers a query",
}
"""What people come for, in the order in which lists have it: the name of a task, and what its rows do."""


@dataclass(frozen=True, slots=True)
class Learning:
    """What algorithms that learn from the same kind of row have in common, from the row to the loss."""

    family: Family
    """online: rollouts and rewards; sft: demonstrations; preference: judged answers; sample: nothing is trained."""
    objective: Objective
    """What the trainer minimises: a key of rlflow.algorithms.objectives.OBJECTIVES, or none."""
    data_row: Literal[
        "prompt", "example", "pair", "margin_pair", "labelled", "judged", "classified", "related", "ranked"
    ]
    """What a row of data is: a prompt, an example, two answers of which one is better (with a margin by which it should
    win), or an answer with a label (which is compared with answers to other prompts, or not); a text with its class,
    texts that are related or not, a query with its documents."""
    head: Literal["token", "scalar", "classes", "embedding", "yes_no"] = "token"
    """What the trained model puts out: logits of every token; or of a whole sequence one score, a number for each
    class, an embedding, or how much likelier `yes` is than `no` as its next token."""
    batch_targets: Literal["none", "no_rewards", "pair_loss", "mismatched_kl", "zero_kl", "texts"] = "none"
    """What the loss needs to know of the whole batch before the update: what ``preference.loss`` asks for, or KTO's KL,
    from a forward pass, or 0 in its place, or which texts are the same; advantages of 0 without rewards. A key of
    rlflow.algorithms.batch_targets.BATCH_TARGETS."""
    weights: Literal["all", "chosen"] = "all"
    """Whose tokens ``loss.reduction`` weighs: those of all samples, or of the chosen answers, whose likelihood a
    preference loss may add. A key of rlflow.algorithms.weighing.WEIGHTS."""
    has_entropies: bool = True
    """Whether the entropy of the policy is among the metrics."""
    held_out: Literal["", "classification", "embedding", "reranking"] = ""
    """What is measured on held-out rows from the model's outputs, beside the loss: a key of
    rlflow.algorithms.sequence_metrics.HELD_OUT."""

    @property
    def generates(self) -> bool:
        """Whether a row of data is a prompt that a model answers."""
        return self.family in ("online", "sample")

    @property
    def unit_size(self) -> int:
        """Samples that the objective must see together, in order: a pair's two."""
        return 2 if self.data_row in ("pair", "margin_pair") else 1

    @property
    def sequences_a_row(self) -> int:
        """What a row of data is at least: the two of a pair, an anchor and a positive, two documents."""
        return 2 if self.data_row in ("pair", "margin_pair", "related", "ranked") else 1


@dataclass(frozen=True, slots=True)
class AlgorithmRow:
    task: Task
    """Under which heading it is listed; nothing is computed from it."""
    learning: Learning
    """From the row of data to the loss."""
    summary: str
    source: str
    """The paper that defines the row."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Recipe keys under ``algorithm`` that differ from the schema's neutral defaults."""

    @property
    def family(self) -> Family:
        return self.learning.family

    @property
    def objective(self) -> Objective:
        return self.learning.objective

    def value(self, key: str, otherwise: Any) -> Any:
        """The row's default of a dotted key; ``otherwise`` where it has none of its own."""
        value: Any = self.defaults
        for part in key.split("."):
            if part not in value:
                return otherwise
            value = value[part]
        return value
