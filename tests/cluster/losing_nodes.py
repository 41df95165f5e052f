"""A run on a Ray cluster of several nodes of this machine that loses two of them: `python losing_nodes.py DIRECTORY`.

Each node has room for one actor: two trainers and a rollout worker are spread over three. The node of the rollout
worker is lost behind the first step, that of a trainer behind the third; each time another node joins.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

import rlflow
from rlflow.driver.errors import RunError
from rlflow.driver.run import run_recipes
from rlflow.shared_files import SharedFile, require_shared

BUNDLES = ("trainer[0]", "trainer[1]", "rollout[0]", "rewards[0]")
"""In the order in which they are reserved."""
LOST_BEHIND = {1: "rollout[0]", 3: "trainer[1]"}
RECIPE: dict[str, Any] = {
    "algorithm": {"name": "grpo", "group_size": 2, "kl": {"coef": 0.0}},
    "model": {
        "characters": "0123456789+=",
        "architecture": {
            "model_type": "qwen3",
            "hidden_size": 16,
            "intermediate_size": 32,
            "head_dim": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "data": {
        "train": {"generator": "arithmetic", "args": {"rows": 8}},
        "prompts_per_step": 4,
        "max_prompt_tokens": 16,
    },
    "trainer": {"workers": 2},
    "rollout": {"engine": "torch", "max_new_tokens": 4},
    "tracking": ["jsonl"],
    "run": {"steps": 4, "save_every": 1},
}
REWARD = "def evenness(completions, **columns):\n    return [sum(map(ord, text)) % 7 for text in completions]\n"


class LosesNodes(rlflow.Callback):
    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.lost = cluster, set[str]()

    def on_step(self, step: int, metrics: Any) -> None:
        actor = LOST_BEHIND.get(step)
        if actor is None or actor in self.lost:
            return
        self.lost.add(actor)
        nodes = place_of_each()
        assert len({nodes[name] for name in BUNDLES[:3]}) == 3, nodes
        (node,) = [node for node in self.cluster.worker_nodes if node.node_id == nodes[actor]]
        print(f"lost behind step {step}: the node of {actor}", flush=True)
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(num_cpus=1)


def place_of_each() -> dict[str, str]:
    """Name of an actor -> id of its node."""
    (group,) = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    return {BUNDLES[index]: node for index, node in group["bundles_to_node_id"].items()}


def missing_file(nodes: list[Any], directory: Path) -> str:
    """What is said of a file that one process sees under its path and another does not."""
    os.chdir(directory)
    (directory / "judge.py").write_text("")
    file = SharedFile("rewards.0.plugin", "/proc/self/cwd/judge.py", frozenset({"rewards"}))
    require_shared([file], {nodes[0].node_id: frozenset({"rollout"})})
    try:
        require_shared([file], {nodes[0].node_id: frozenset({"rewards", "rollout"})})
    except RunError as error:
        return str(error)
    return "nothing"


def main(directory: Path) -> None:
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick},
    )
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        ray.init(cluster.address, log_to_driver=False)
        print(f"missing: {missing_file(nodes, directory)}", flush=True)
        (directory / "evenness.py").write_text(REWARD)
        run = {**RECIPE["run"], "output_dir": str(directory / "run")}
        rewards = [{"plugin": f"{directory / 'evenness.py'}:evenness"}]
        recipes = rlflow.load_recipe({**RECIPE, "run": run, "rewards": rewards})
        run_recipes(recipes, callbacks=[LosesNodes(cluster)])
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
