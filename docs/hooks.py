"""What MkDocs does beside its plugins: the README as a page of the site, and docstrings' cross-references as plain names."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>~?(?:[\w.]*\.)?(\w+)</code>")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """readme.md is the README, so that its facts have one place; links within docs/ stay, those to other files become names."""
    if page.file.src_uri != "readme.md":
        return markdown
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|[\w/-]+\.md[)#])[^)]*\)", r"`\1`", _outside(text))


def _outside(text: str) -> str:
    """Links to Markdown files that are not part of the site, as code."""
    inside = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}

    def shown(link: "re.Match[str]") -> str:
        return link[0] if link[2].partition("#")[0] in inside else f"`{link[2]}`"

    return re.sub(r"\[([^\]]+)\]\(([\w/.-]+\.md(?:#[\w-]+)?)\)", shown, text)


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`~package.name``` of a docstring as ``name``."""
    return ROLE.sub(r"<code>\1</code>", html)
