"""Runs that are started, watched, stopped and resumed from the page."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from ui_server import CHANGE, Client, ask, until, write_lock, write_run

from rlflow.ui.commands import command_id
from rlflow.ui.recipes import Recipes
from rlflow.ui.refusal import Refusal

RECIPE = """\
algorithm: {name: sft}
model: {characters: "0123456789+=", architecture: {model_type: qwen3, hidden_size: 8, num_hidden_layers: 1,
        num_attention_heads: 1, num_key_value_heads: 1, intermediate_size: 8, head_dim: 8}}
data: {train: {generator: arithmetic, args: {split: train}}, prompts_per_step: 4, max_tokens: 64}
run: {output_dir: runs/fake, steps: 100000}
"""


async def post(client: Client, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with client.post(path, json=body, headers=CHANGE) as response:
        return response.status, await response.json()


async def get(client: Client, path: str, **parameters: Any) -> dict[str, Any]:
    async with client.get(path, params=parameters) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def write_recipe(home: Path) -> str:
    (home / "recipes" / "fake.yaml").write_text(RECIPE)
    return "recipes/fake.yaml"


@pytest.mark.slow
def test_a_recipe_is_started_watched_stopped_and_resumed(home: Path):
    file = write_recipe(home)

    async def talk(client: Client) -> None:
        assert (await get(client, "/api/recipes"))["files"] == [file]
        assert (await get(client, "/api/recipe", file=file))["text"] == RECIPE
        status, started = await post(client, "/api/start", file=file, text=RECIPE, overrides=["run.seed=3"])
        assert status == 200, started
        command = started["command"]
        assert command["runs"] == ["fake"] and command["command"].endswith("recipes/fake.yaml run.seed=3")

        async def card() -> Any:
            shown = (await get(client, "/api/runs"))["runs"]
            return shown[0] if shown and (shown[0]["step"] or 0) >= 3 else None

        running = await until(card)
        assert (running["run"], running["state"], running["steps"]) == ("fake", "running", 100000)
        assert os.getsid(json.loads((home / "runs/fake/.rlflow.lock").read_text())["pid"]) != os.getsid(0)
        first = await get(client, "/api/metrics", run="fake", offset=0, file="")
        assert first["steps"][:3] == [1, 2, 3] and first["metrics"]["reward/mean"][:3] == [0.01, 0.02, 0.03]
        log = await get(client, "/api/log", run="fake", name="run.log")
        assert log["text"].startswith("step 1 <b>done</b>\n")
        said = await get(client, "/api/log", command=command["id"])
        assert said["text"].startswith("fake run: run ")
        again = await post(client, "/api/start", file=file, text=RECIPE, overrides=[])
        assert again[0] == 409 and "is in use by process" in again[1]["error"]
        assert (await post(client, "/api/resume", run="fake"))[0] == 409

        assert (await post(client, "/api/stop", run="fake"))[0] == 200

        async def ended() -> Any:
            shown = await get(client, "/api/run", run="fake")
            return shown if shown["command"]["exit_code"] is not None else None

        shown = await until(ended)
        stopped = shown["card"]
        assert (stopped["state"], shown["command"]["exit_code"]) == ("stopped", 3)
        assert "go on with --resume" in stopped["message"]
        assert shown["checkpoints"] == [stopped["step"]] and "max_tokens: 64" in shown["recipe"]
        assert (await post(client, "/api/stop", run="fake"))[0] == 409

        steps = stopped["step"] + 2
        status, resumed = await post(client, "/api/resume", run="fake", overrides=[f"run.steps={steps}"])
        assert status == 200 and resumed["command"]["command"].endswith(f"run.seed=3 run.steps={steps} --resume")
        shown = await until(ended)
        assert shown["command"]["exit_code"] == 0
        assert (shown["card"]["state"], shown["card"]["step"], shown["has_final"]) == ("finished", steps, True)
        since = await get(client, "/api/metrics", run="fake", offset=first["offset"], file=first["file"])
        assert since["is_anew"] is False and since["steps"] == list(range(first["steps"][-1] + 1, steps + 1))

    ask(home, talk)


@pytest.mark.slow
def test_a_recipe_that_is_wrong_is_not_started_and_its_lines_are_named(home: Path):
    file = write_recipe(home)
    text = RECIPE.replace("steps: 100000", "stepz: 5").replace("split: train}}", "split: train}, oops: 1}")

    async def talk(client: Client) -> None:
        status, verdict = await post(client, "/api/check", file=file, text=text, overrides=[])
        assert status == 200 and verdict["is_right"] is False
        assert sorted(line for line, _ in verdict["problems"]) == [4, 5]
        assert any("stepz" in problem and "steps" in problem for _, problem in verdict["problems"])
        assert not any("fake-" in problem or "/recipes" in problem for _, problem in verdict["problems"])
        status, refused = await post(client, "/api/start", file=file, text=text, overrides=[], save_as="other.yaml")
        assert status == 422 and refused["problems"] == verdict["problems"]
        _, verdict = await post(client, "/api/check", file=file, text=RECIPE, overrides=["run.stps=1"])
        assert [line for line, _ in verdict["problems"]] == [None] and "command line" in verdict["problems"][0][1]
        _, verdict = await post(client, "/api/check", file=file, text=RECIPE + "\n# a remark\n", overrides=[])
        assert verdict["is_right"], verdict
        assert "runs/fake" in verdict["plan"]

    ask(home, talk)
    assert [path.name for path in (home / "recipes").iterdir()] == ["fake.yaml"] and not any((home / "runs").iterdir())


@pytest.mark.slow
def test_an_edited_recipe_is_kept_beside_the_one_it_came_from_which_stays(home: Path):
    file = write_recipe(home)
    edited = RECIPE.replace("100000", "2")

    async def talk(client: Client) -> None:
        for name, status in (("../evil.yaml", 422), ("fake.yaml", 409), ("run.sh", 422), ("", 422)):
            answer = await post(client, "/api/start", file=file, text=edited, overrides=[], save_as=name)
            assert answer[0] == status, answer
        status, _ = await post(client, "/api/start", file=file, text=edited, overrides=[], save_as="short.yaml")
        assert status == 200
        assert "recipes/short.yaml" in (await get(client, "/api/recipes"))["files"]

        async def is_done() -> bool:
            shown = (await get(client, "/api/runs"))["runs"]
            return [(run["state"], run["step"]) for run in shown] == [("finished", 2)]

        await until(is_done)

    ask(home, talk)
    assert (home / "recipes" / "fake.yaml").read_text() == RECIPE
    assert (home / "recipes" / "short.yaml").read_text() == edited


@pytest.mark.slow
def test_what_comes_with_rlflow_can_be_started_and_stays_as_it_is(home: Path, tmp_path: Path):
    packaged = tmp_path / "site-packages" / "fake.yaml"
    packaged.parent.mkdir()
    packaged.write_text(RECIPE)
    recipes = Recipes([home / "recipes"], home, [packaged])
    assert (recipes.own(), recipes.packaged()) == ({}, {str(packaged): packaged})
    assert asyncio.run(recipes.check(str(packaged), RECIPE, [], data=False)).is_right
    remedy = re.escape(f"`mkdir -p {home}/recipes && rlflow recipes fake > {home}/recipes/fake.yaml`")
    with pytest.raises(Refusal, match=remedy):
        asyncio.run(recipes.check(str(packaged), RECIPE + "#", [], data=False))
    with pytest.raises(Refusal, match=remedy):
        recipes.keep(str(packaged), RECIPE + "#", "new.yaml")
    (home / "recipes").rmdir()
    (home / "recipes").symlink_to(packaged.parent)
    assert (recipes.own(), recipes.packaged()) == ({str(packaged): packaged}, {})
    assert recipes.keep(str(packaged), RECIPE + "#", "new.yaml") == str(packaged.with_name("new.yaml"))


@pytest.mark.parametrize("override", ["--resume", "-x=1", "noequals", "=1", "a b=1", 5, "x=\0"])
def test_an_override_cannot_be_an_option_of_the_command(home: Path, override: Any):
    file = write_recipe(home)

    async def talk(client: Client) -> None:
        for path in ("/api/check", "/api/start"):
            assert (await post(client, path, file=file, text=RECIPE, overrides=[override]))[0] == 422

    ask(home, talk)


def test_only_listed_recipes_are_read_and_runs_write_below_the_directory_alone(home: Path):
    file = write_recipe(home)
    (home / "secret.yaml").write_text("password: x")
    (home / "recipes" / "link.yaml").symlink_to(home / "secret.yaml")
    (home / "recipes" / "notes.txt").write_text("x")

    async def talk(client: Client) -> None:
        assert (await get(client, "/api/recipes"))["files"] == [file]
        for name in ("secret.yaml", "recipes/../secret.yaml", "recipes/link.yaml", "recipes/notes.txt", "/etc/passwd"):
            assert (await client.get("/api/recipe", params={"file": name})).status == 404
            assert (await post(client, "/api/check", file=name, text="", overrides=[]))[0] == 404
        elsewhere = await post(client, "/api/start", file=file, text=RECIPE, overrides=[f"run.output_dir={home}/x"])
        assert elsewhere[0] == 422 and f"is not below {home}/runs" in elsewhere[1]["error"]

    ask(home, talk)


@pytest.mark.slow
def test_a_run_that_was_not_started_here_goes_on_from_the_recipe_in_its_directory(home: Path):
    file = write_recipe(home)

    async def make(client: Client) -> None:
        overrides = ["run.steps=2", "run.output_dir=runs/made"]
        assert (await post(client, "/api/start", file=file, text=RECIPE, overrides=overrides))[0] == 200

        async def is_done() -> bool:
            return any(run["state"] == "finished" for run in (await get(client, "/api/runs"))["runs"])

        await until(is_done)

    ask(home, make)
    for record in (home.parent / "state").rglob("*.json"):
        record.unlink()
    (home / "runs" / "made").rename(home / "runs" / "moved")

    async def talk(client: Client) -> None:
        status, answer = await post(client, "/api/resume", run="moved", overrides=["run.steps=4"])
        assert status == 200 and answer["command"]["runs"] == ["moved"], answer

        async def is_done() -> bool:
            return (await get(client, "/api/run", run="moved"))["card"]["step"] == 4

        await until(is_done)

    ask(home, talk)


def test_a_process_that_has_got_another_number_is_not_stopped(home: Path):
    run = write_run(home / "runs" / "a", 1)
    write_lock(run, os.getpid(), began="1")

    async def talk(client: Client) -> None:
        status, answer = await post(client, "/api/stop", run="a")
        assert (status, answer["error"]) == (409, "a is not running")

    ask(home, talk)


def test_a_directory_that_cannot_be_written_in_can_be_watched(home: Path):
    write_run(home / "runs" / "a", 3)
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*")}

    async def talk(client: Client) -> None:
        assert [run["step"] for run in (await get(client, "/api/runs"))["runs"]] == [3]
        assert (await get(client, "/api/run", run="a"))["summary"]["last_step"] == 3
        assert (await get(client, "/api/metrics", run="a"))["steps"] == [1, 2, 3]

    ask(home, talk)
    assert {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*")} == before


def test_commands_of_one_second_are_in_the_order_in_which_they_were_started():
    names = [command_id(1_800_000_000 + milliseconds / 1000) for milliseconds in range(0, 1000, 7)]
    assert names == sorted(names)
