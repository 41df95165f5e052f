"""The documentation leads somewhere: its links have targets, and its commands are ones that rlflow takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlflow.cli.main import COMMANDS, load_command
from rlflow.recipe.explain import blocks_at
from rlflow.recipe.loading import load_located
from rlflow.recipe.packaged import packaged_recipe
from tests.documentation import ROOT, DocumentedCommand, Page, pages

PAGES = pages()
ALL_COMMANDS = [command for page in PAGES for command in page.commands]
OF_THE_READER = {"recipe.yaml", "changed.yaml"}
"""Recipes that a page speaks of and does not show: what `rlflow convert -o` wrote, one that the reader changed."""


def of(page: Page) -> str:
    return page.name


@pytest.mark.parametrize("page", [*PAGES, Page(ROOT / "CONTRIBUTING.md")], ids=of)
def test_every_link_of_a_page_has_a_target(page: Page):
    missing = []
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.path.parent / name).resolve() if name else page.path
        if not target.is_relative_to(ROOT) or not target.exists():
            missing.append(link)
        elif anchor and anchor not in Page(target).anchors:
            missing.append(f"{link}: no such heading")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=of)
def test_every_command_of_a_page_is_taken_by_its_parser(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in page.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for command in page.commands:
        if command.program == "make":
            check_make(command)
        else:
            check_rlflow(command)


def check_make(command: DocumentedCommand) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [word for word in command.words if "=" not in word]
    assert set(named) <= set(targets), command


def check_rlflow(command: DocumentedCommand) -> None:
    """A recipe that it names must exist and have the keys that it sets."""
    name, *words = command.words
    if name.startswith("-"):
        return
    assert name in COMMANDS, command
    try:
        arguments = load_command(name).make_parser().parse_intermixed_args(words)
    except SystemExit:
        pytest.fail(f"{command}: the parser refuses it")
    if getattr(arguments, "recipe", None) is None:
        return
    recipe = Path(arguments.recipe)
    is_here = recipe.exists() or packaged_recipe(str(recipe)) is not None
    if is_here or recipe.name not in OF_THE_READER:
        load_located(str(recipe) if is_here else ROOT / recipe, getattr(arguments, "overrides", ()))


def test_the_sites_navigation_has_every_page_of_docs_and_no_other():
    named = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) == len(set(named))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {name for name in named if not name.startswith("repository/")} == there
    assert all((ROOT / name.removeprefix("repository/")).is_file() for name in set(named) - there)


def test_the_commands_that_everything_is_about_are_among_them():
    """What reads the pages does not overlook them."""
    assert {command.words[0] for command in ALL_COMMANDS if command.program == "rlflow"} >= {
        "run", "plan", "convert", "infer", "serve", "eval", "export", "report", "logs", "inspect", "ui", "doctor"
    }  # fmt: skip
    assert [str(command) for command in ALL_COMMANDS if command.page == "cluster/README.md"] != []
    assert len(ALL_COMMANDS) > 60


TROUBLESHOOTING = Page(ROOT / "docs/troubleshooting.md")


def test_every_message_that_troubleshooting_quotes_is_one_of_the_code():
    sources = [path for folder in ("rlflow", "actors", "rewards") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in sources)
    quoted = re.findall(r'"([^"]+)"', TROUBLESHOOTING.text)
    assert len(quoted) > 12
    parts = [part.strip() for text in quoted for part in text.split("...")]
    assert [part for part in parts if part not in code] == []


def test_every_key_and_metric_that_troubleshooting_names_exists():
    spans = re.findall(r"`([^`]+)`", TROUBLESHOOTING.text)
    named = {span.partition(":")[0] for span in spans}
    keys = {name for name in named if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) and not name.endswith(".md")}
    fields = {f"{path}.{field}" for path, kinds in blocks_at().items() for kind in kinds for field in kind.model_fields}
    assert len(keys) > 30
    assert keys - fields == set()
    metrics = {name for name in named if re.fullmatch(r"[a-z]+/[a-z_@<>/1]+", name)}
    documented = re.findall(r"`([a-z]+/[^`]+)`", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"))
    pattern = "|".join(re.sub(r"<\w+>", "[^/]+", name) for name in documented)
    assert len(metrics) > 20
    assert {name for name in metrics if not re.fullmatch(pattern, name)} == set()
