"""The documents of the repository, and what is written in them: fenced blocks, code in a line, links, headings."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted((REPO / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def title(page: Path) -> str:
    return page.relative_to(REPO).as_posix()


def blocks(*languages: str) -> Iterator[tuple[Path, str]]:
    """Page and text of every fenced block in one of these languages."""
    for page in PAGES:
        for language, text in _FENCE.findall(page.read_text()):
            if language in languages:
                yield page, text


def each_block(*languages: str) -> list[object]:
    """Every such block as a case of a test, named after its page."""
    return [pytest.param(text, id=f"{title(page)}-{i}") for i, (page, text) in enumerate(blocks(*languages))]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """What a link's #fragment may be: GitHub's names for the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
