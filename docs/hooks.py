"""For ``make docs``: links that lead out of docs/ (results, tests, examples) work on the site as they do on GitHub.

A page may link to any file of the repository by its relative path. Here that file joins the site, Python as a page of
its own. Of a link to a folder the words are left; a link to nothing fails the strict build.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|[#/])([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to, and what that links to."""
    pages = [page.src_uri for page in files.documentation_pages()]
    for page in pages:  # which grows
        for _, target, _ in _LINK.findall(_source(page).read_text(encoding="utf-8")):
            path = _resolved(page, target)
            if path.startswith("docs/") or not (ROOT / path).is_file() or files.get_file_from_path(_on_site(path)):
                continue
            content = (ROOT / path).read_bytes()
            if path.endswith(".py"):
                content = b"# `" + path.encode() + b"`\n\n```python\n" + content + b"```\n"
            files.append(File.generated(config, _on_site(path), content=content))
            pages += [path] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to where those files are on the site."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        words, target, anchor = link.groups()
        path = _resolved(here, target)
        if (ROOT / path).is_dir():
            return words
        return f"[{words}]({relpath(_on_site(path), dirname(here) or '.')}{anchor or ''})"

    return _LINK.sub(moved, markdown)


def _source(page: str) -> Path:
    inside = ROOT / "docs" / page
    return inside if inside.is_file() else ROOT / page


def _resolved(page: str, target: str) -> str:
    """What ``target`` on ``page`` is, as a path from the root of the repository."""
    return normpath(f"{dirname(_source(page).relative_to(ROOT).as_posix())}/{target}")


def _on_site(path: str) -> str:
    return f"{path}.md" if path.endswith(".py") else path.removeprefix("docs/")
