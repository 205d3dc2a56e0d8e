"""For ``make docs``: links that lead out of docs/ (result files, tests, examples) work on the site as they do on GitHub.

A page may link to any file of the repository by its relative path. Here that file joins the site, Python as a page of its own. Of a
link to a folder the words are left; a link to nothing fails the strict build.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to."""
    for page in list(files.documentation_pages()):
        for _, target, _ in _LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            inside = _inside_repository(page.src_uri, target)
            if inside and (ROOT / inside).is_file() and files.get_file_from_path(_on_site(inside)) is None:
                content = (ROOT / inside).read_bytes()
                if inside.endswith(".py"):
                    content = b"# `" + inside.encode() + b"`\n\n```python\n" + content + b"```\n"
                files.append(File.generated(config, _on_site(inside), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links to where those files are on the site."""

    def moved(link: re.Match[str]) -> str:
        words, target, anchor = link.groups()
        inside = _inside_repository(page.file.src_uri, target)
        if inside is None:
            return link[0]
        if (ROOT / inside).is_dir():
            return words
        up = "../" * page.file.src_uri.count("/")
        return f"[{words}]({up}{_on_site(inside)}{anchor or ''})"

    return _LINK.sub(moved, markdown)


def _on_site(inside: str) -> str:
    return f"{inside}.md" if inside.endswith(".py") else inside


def _inside_repository(page: str, target: str) -> str | None:
    """``target`` of a link on ``page``, as a path from the root of the repository; None where it stays inside docs/."""
    parts: list[str] = ["docs", *PurePosixPath(page).parent.parts]
    for part in PurePosixPath(target).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts) if parts[0] != "docs" else None
