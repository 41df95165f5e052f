"""What a row of the algorithm table is: columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal[
    "online", "distillation", "sft", "preferences", "reward_model", "classification", "embedding", "reranking"
]

TASKS: dict[Task, str] = {
    "online": "learn from rollouts and their rewards (ref: a reference, critic: a value model)",
    "distillation": "learn from a teacher",
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

    family: Literal["online", "sft", "preference"]
    """online: rollouts and rewards; sft: demonstrations; preference: judged answers."""
    objective: Literal["policy", "sft", "preference", "kto", "reward_model"]
    """What the trainer minimises: a key of rlflow.algorithms.objectives.OBJECTIVES."""
    data_row: Literal["prompt", "example", "pair", "margin_pair", "labelled", "judged"]
    """What a row of data is: a prompt, an example, two answers of which one is better (with a margin by which it should
    win), or an answer with a label (which is
    compared with answers to other prompts, or not)."""
    head: Literal["token", "scalar"] = "token"
    """What the trained model puts out: logits of every token, or one score."""
    batch_targets: Literal["none", "pair_loss", "mismatched_kl", "zero_kl"] = "none"
    """What the loss needs to know of the whole batch, from a forward pass before the update: what ``preference.loss``
    asks for, or KTO's KL, or 0 in its place. A key of rlflow.algorithms.batch_targets.BATCH_TARGETS."""
    weights: Literal["all", "chosen"] = "all"
    """Whose tokens ``loss.reduction`` weighs: those of all samples, or of the chosen answers, whose likelihood a
    preference loss may add. A key of rlflow.algorithms.weighing.WEIGHTS."""
    has_entropies: bool = True
    """Whether the entropy of the policy is among the metrics."""

    @property
    def unit_size(self) -> int:
        """Samples that the objective must see together, in order: a pair's two."""
        return 2 if self.data_row in ("pair", "margin_pair") else 1


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
    def family(self) -> Literal["online", "sft", "preference"]:
        return self.learning.family

    @property
    def objective(self) -> Literal["policy", "sft", "preference", "kto", "reward_model"]:
        return self.learning.objective

    def value(self, key: str, otherwise: Any) -> Any:
        """The row's default of a dotted key; ``otherwise`` where it has none of its own."""
        value: Any = self.defaults
        for part in key.split("."):
            if part not in value:
                return otherwise
            value = value[part]
        return value
