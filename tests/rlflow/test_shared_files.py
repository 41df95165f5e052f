"""Which files of a recipe the nodes of a cluster are asked for."""

from __future__ import annotations

from pathlib import Path

from rlflow.recipe import load_recipe
from rlflow.shared_files import shared_files


def test_the_users_own_files_are_asked_of_the_nodes_whose_actors_import_them(tmp_path: Path):
    names = ("reward.py", "loss.py", "optimizer.py", "world.py", "callback.py")
    files = {name: tmp_path / name for name in names}
    for file in files.values():
        file.write_text("")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
algorithm: {{name: grpo, loss: {{kind: "{files["loss.py"]}:clip"}}}}
model: {{path: {tmp_path}}}
data: {{train: {{generator: arithmetic}}}}
rewards: [{{plugin: "{files["reward.py"]}:good"}}]
environment: {{plugin: "{files["world.py"]}:World"}}
trainer: {{optimizer: {{kind: "{files["optimizer.py"]}:make"}}}}
callbacks: ["{files["callback.py"]}:Heard"]
run: {{steps: 1, output_dir: {tmp_path / "run"}}}
""")
    (loaded,) = load_recipe(recipe)
    asked = {file.path: set(file.roles) for file in shared_files(loaded, loaded.model, tmp_path / "run")}
    assert asked == {
        str(tmp_path / "run"): {"trainer", "critic"},
        str(tmp_path): {"trainer", "critic", "reference", "rollout"},
        str(files["reward.py"]): {"rewards"},
        str(files["loss.py"]): {"trainer"},
        str(files["optimizer.py"]): {"trainer"},
        str(files["world.py"]): {"rollout"},
    }
