"""`rlflow submit`: `ray job submit` of `rlflow run`, with a lean working directory, followed to its end."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from rlflow.cli.common import add_recipe_arguments, parser_of
from rlflow.cli.secret_checks import in_overrides
from rlflow.driver.errors import GO_ON, RunError, StopRequested
from rlflow.ray_jobs import dashboard_url, last_line, require_dashboard, token_headers, use_dashboard
from rlflow.recipe import Problem, RecipeError, load_recipe

EXCLUDES = (
    ".git",
    ".venv*",
    "/venv",
    "/env",
    ".env",
    "__pycache__",
    ".*_cache",
    "*.egg-info",
    "node_modules",
    "/runs",
    "/checkpoints",
    "/models",
    "/wandb",
    "/dist",
    "/build",
)
"""What never travels, in .gitignore's syntax."""


STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
"""What a job that is stopped has for its checkpoint. Ray's own is 3 s, then it kills. Nothing else of this environment
travels: everybody who sees the dashboard sees a job's environment."""
_TAIL = 2000
"""Characters of the log whose end says how the run ended."""

SUMMARY = "run a recipe as a job of a Ray cluster, and follow it"


def make_parser() -> argparse.ArgumentParser:
    example = "rlflow submit recipes/grpo_gsm8k_smollm2.yaml run.output_dir=/shared/runs/gsm8k --address http://127.0.0.1:8265"
    parser = parser_of("submit", SUMMARY, example)
    add_recipe_arguments(parser)
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard; RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265, when left out. "
        "Its token is that of RAY_AUTH_TOKEN",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run.output_dir")
    return parser


def execute(arguments: argparse.Namespace) -> int:
    directory = Path.cwd()
    if exposed := list(in_overrides(arguments.overrides)):
        raise RecipeError(exposed)
    recipe = _within(Path(arguments.recipe), directory)
    for stage in load_recipe(arguments.recipe, arguments.overrides):
        if Path(stage.run.output_dir).is_relative_to(directory):
            print(
                f"results will stay on the cluster's head node, in the job's copy of {directory}: set run.output_dir "
                "to a directory that every node shares",
                file=sys.stderr,
            )
            break
    url = dashboard_url(arguments.address)
    if difference := require_dashboard(url):
        print(difference, file=sys.stderr)
    use_dashboard(url)
    entrypoint = make_entrypoint(recipe, arguments.overrides, resume=arguments.resume)
    return asyncio.run(submit(url, entrypoint, make_runtime_env(directory)))


def make_entrypoint(recipe: Path, overrides: list[str], *, resume: bool) -> str:
    """The command that the cluster runs, in its copy of the working directory."""
    return shlex.join(["python", "-m", "rlflow", "run", recipe.as_posix(), *overrides, *["--resume"] * resume])


def make_runtime_env(directory: Path) -> dict[str, Any]:
    """The working directory without what is large, secret or of this machine only, and the time that a stop has."""
    environments = [f"/{marker.parent.name}" for marker in directory.glob("*/pyvenv.cfg")]
    variables = {name: os.environ.get(name, default) for name, default in STOP_WAIT.items()}
    return {"working_dir": str(directory), "excludes": [*EXCLUDES, *environments], "env_vars": variables}


async def submit(url: str, entrypoint: str, runtime_env: dict[str, Any]) -> int:
    """Starts the job, prints its log as it grows, and returns its exit code.

    Raises:
        StopRequested: Somebody stopped the job, and its run left a checkpoint.
        RunError: The cluster does not take the job, or the connection broke while the job goes on.
    """
    from aiohttp import ClientError
    from ray.exceptions import RayError
    from ray.job_submission import JobStatus, JobSubmissionClient

    at = f"--address {url}"
    try:
        client = JobSubmissionClient(url, headers=token_headers())
        job = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise RunError(f"the job could not be submitted: {last_line(error)}") from error
    print(f"job {job}: {entrypoint}", file=sys.stderr)
    tail = ""
    try:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)
            tail = (tail + text)[-_TAIL:]
        info = client.get_job_info(job)
        if not info.status.is_terminal():
            raise RunError(f"its log has ended, and it is {info.status}")
    except (OSError, RuntimeError, ClientError, RayError) as error:
        reason = last_line(error)
        raise RunError(f"lost sight of job {job} ({reason}); it goes on: ray job logs {at} --follow {job}") from error
    except asyncio.CancelledError:
        print(f"job {job} goes on; to end it: ray job stop {at} {job}", file=sys.stderr)
        raise
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED and GO_ON in tail:
        # Ray keeps no exit code of a job that was stopped.
        raise StopRequested(f"job {job} was stopped, with a checkpoint: submit it again with --resume")
    # Without an exit code the command never ran, and the message is all there is; with one it repeats the log.
    reason = info.message if info.driver_exit_code is None else f"exit code {info.driver_exit_code}"
    print(f"job {job}: {info.status}: {reason}", file=sys.stderr)
    return info.driver_exit_code or 1


def _within(recipe: Path, directory: Path) -> Path:
    """The recipe's path in the working directory. Raises RecipeError when it is elsewhere."""
    path = recipe.resolve()
    if not path.is_relative_to(directory.resolve()):
        message = f"is not below {directory}, which is what the cluster gets: go to a directory that holds it"
        raise RecipeError([Problem(str(recipe), None, "", message)])
    return path.relative_to(directory.resolve())
