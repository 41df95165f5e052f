"""ms-swift's flags of a teacher -> a recipe's."""

from __future__ import annotations

from rlflow.convert.folds import Machines
from rlflow.convert.given import Draft, Given


def set_teacher(given: Given, draft: Draft, kind: str, machines: Machines) -> None:
    """A GKD run's divergence and its teacher, or what a teacher adds to the advantages of another run."""
    if kind == "gkd":
        _set_divergence(given, draft)
    elif given["teacher_model"] or given["teacher_model_server"]:
        draft.set("algorithm.distill.kind", "advantage", given.texts("teacher_model", "teacher_model_server"))
        draft.set("algorithm.distill.coef", given["teacher_kl_coef"], given.text("teacher_kl_coef"))
    else:
        return
    if given["teacher_model_server"]:
        draft.set("teacher.url", given["teacher_model_server"], given.text("teacher_model_server"))
    elif given["teacher_model"]:
        draft.set("teacher.path", given["teacher_model"], given.text("teacher_model"))
        if machines.gpus:
            draft.set("teacher.gpus_per_worker", 1, "a GPU of its own, beside those of the others")
    else:
        draft.note("to do", "no --teacher_model is given: set teacher.path")


def _set_divergence(given: Given, draft: Draft) -> None:
    share = 0.5 if given["lmbda"] is None else given["lmbda"]
    draft.set("algorithm.distill.on_policy", float(share), given.text("lmbda"))
    beta = 0.5 if given["beta"] is None else given["beta"]
    draft.set("algorithm.distill.beta", float(beta), given.text("beta"))
    draft.set("algorithm.distill.top_k", given["gkd_logits_topk"], given.text("gkd_logits_topk"))
    if given["seq_kd"]:
        draft.note(
            "to do",
            f"{given.text('seq_kd')}: have the teacher answer first, in a stage of algorithm sample, and name that "
            "stage as data.train.stage (docs/sampling.md)",
        )
    if given["sft_alpha"]:
        draft.note("missing", f"{given.text('sft_alpha')}: the data's answers have the divergence alone")
    if 0 < share < 1:
        draft.note("default", "there each batch is drawn to be the policy's answers or the data's, here each row is")
