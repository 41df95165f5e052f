"""TRL's flags of a teacher (GKDConfig, DistillationConfig) -> a recipe's."""

from __future__ import annotations

from rlflow.convert.given import Draft, Given


def generates(draft: Draft) -> bool:
    """Whether the policy answers some of the rows of a run that has a teacher."""
    return draft.values.get("algorithm.distill.on_policy", 0.0) > 0


def set_gkd(given: Given, draft: Draft) -> None:
    """A GKDTrainer's run: each batch is the policy's answers or the data's, by lmbda; both at temperature 1."""
    draft.set("rollout.engine", "torch", "transformers generates there")
    if given["seq_kd"]:
        draft.note(
            "to do",
            f"{given.text('seq_kd')}: have the teacher answer first, in a stage of algorithm sample, and name that "
            "stage as data.train.stage (docs/sampling.md)",
        )
    if 0 < draft.values["algorithm.distill.on_policy"] < 1:
        draft.note("default", "there each batch is drawn to be the policy's answers or the data's, here each row is")
    _need_teacher(draft)


def set_distillation(given: Given, draft: Draft) -> None:
    """A DistillationTrainer's run: on the policy's answers alone, with one temperature for sampling and divergence."""
    draft.set("algorithm.distill.on_policy", 1.0, "it trains on its own answers")
    for name in ("rollout.temperature", "algorithm.distill.temperature"):
        draft.set(name, float(given["temperature"]), given.text("temperature"))
    _need_teacher(draft)


def _need_teacher(draft: Draft) -> None:
    if "teacher.path" not in draft.values:
        draft.note("to do", "no --teacher_model_name_or_path is given: set teacher.path")
