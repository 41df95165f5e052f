"""An mkdocs hook: what pages link to outside docs/ becomes part of the site, under repository/.

Pages are written for the repository, where ``../benchmarks/memory.md`` and ``../recipes/quickstart.yaml`` are files.
Here every file that can be reached from docs/ by such links is added: Markdown as a page, pictures as they are, any
other file as a page that shows its text. Links between all of these are rewritten to where the files are in the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(\))")
PICTURES = {".svg", ".png"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", "Dockerfile": "docker"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pending = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    pending += [f"{place[len('repository/') :]}" for place in _in_navigation(config.nav)]
    found: set[str] = set()
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        if not path.startswith("docs/"):
            files.append(_file(path, config))
        if path.endswith(".md") and (ROOT / path).is_file():
            pending += _targets(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    path = here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}"

    def moved(match: re.Match[str]) -> str:
        named = _resolve(path, match[2])
        if not (ROOT / named).exists():  # code that looks like a link, or a broken link, of which mkdocs warns
            return match[0]
        target = posixpath.relpath(_place(named), posixpath.dirname(here) or ".")
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    if not path.endswith(".md") or not (ROOT / path).is_file():
        return markdown
    return _with_list_items_of_four(LINK.sub(moved, markdown))


def _with_list_items_of_four(markdown: str) -> str:
    """What belongs to an item of a numbered list is indented by 3 for GitHub, and by 4 for Python-Markdown."""
    lines, is_in_list = [], False
    for line in markdown.splitlines():
        if re.match(r"\d\. ", line):
            is_in_list = True
        elif line and not line.startswith("   "):
            is_in_list = False
        lines.append(f" {line}" if is_in_list and line.startswith("   ") else line)
    return "\n".join(lines)


def _resolve(page: str, link: str) -> str:
    """The path in the repository that a page's link names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _place(path: str) -> str:
    """Where a file of the repository is among the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if Path(path).suffix in {".md", *PICTURES}:
        return f"repository/{path}"
    folder, name = posixpath.split(path)
    return posixpath.join("repository", folder, f"{name.lstrip('.')}.md")  # mkdocs leaves out what begins with a dot


def _targets(page: str) -> Iterator[str]:
    for match in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
        path = _resolve(page, match[2])
        if (ROOT / path).exists() and (not path.startswith("docs/") or path.endswith(".md")):
            yield path


def _file(path: str, config: MkDocsConfig) -> File:
    source = ROOT / path
    if not source.is_file():
        raise PluginError(f"{path} is linked to and is no file: name a file in the link")
    if Path(path).suffix in {".md", *PICTURES}:
        return File.generated(config, _place(path), abs_src_path=str(source))
    language = LANGUAGES.get(source.suffix, LANGUAGES.get(source.name, "text"))
    text = source.read_text(encoding="utf-8")
    page = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{language}\n{text}````\n"
    return File.generated(config, _place(path), content=page)


def _in_navigation(nav: Any) -> Iterator[str]:
    """Pages of repository/ that the navigation names."""
    if isinstance(nav, str) and nav.startswith("repository/"):
        yield nav
    elif isinstance(nav, (list, dict)):
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _in_navigation(entry)
