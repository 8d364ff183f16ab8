"""The project's Markdown as data: commands, programs, links and what stands as code in a line."""

import functools
import json
import re
import shlex
from typing import NamedTuple

from tests.command_lines import ROOT

PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "notebooks").glob("*.ipynb")),
        ROOT / "concat_jax/weights/demo/ORIGIN.md",
    )
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What stands for more of the same in a command.
_AND_SO_ON = ("...", "…")


class Piece(NamedTuple):
    """Something in a page, and where: "README.md:12"."""

    place: str
    text: str


@functools.cache
def read(page):
    """The page's text; of a notebook what stands between its programs."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if not page.endswith(".ipynb"):
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def _at(page, text, offset):
    return f"{page}:{text.count(chr(10), 0, offset) + 1}"


def blocks(page, language):
    """The fenced blocks of a language."""
    text = read(page)
    found = _FENCE.finditer(text)
    return [Piece(_at(page, text, f.start(2)), f[2]) for f in found if f[1] == language]


def languages(page):
    return {found[1] for found in _FENCE.finditer(read(page))}


def _prose(page):
    """The page with its blocks blanked out, line for line."""
    return _FENCE.sub(lambda found: re.sub(r"[^\n]", "", found[0]), read(page))


def spans(page):
    """What stands between backticks in a line, or over the end of one."""
    text = _prose(page)
    found = re.finditer(r"`([^`]+)`", text)
    return [Piece(_at(page, text, f.start()), " ".join(f[1].split())) for f in found]


def links(page):
    text = _prose(page)
    found = re.finditer(r"\]\(([^)\s]+)\)", text)
    return [Piece(_at(page, text, f.start()), f[1]) for f in found]


def anchors(page):
    """Names of the headings as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines(page):
    """The words of every command of the page's shell blocks and of those in its text."""
    pieces = blocks(page, "bash")
    pieces += [span for span in spans(page) if re.match(r"(python|pip)\b.* ", span.text)]
    found = []
    for place, text in pieces:
        for line in text.replace("\\\n", " ").splitlines():
            line = re.sub(r"^until (.*?); do .*; done$", r"\1", line)
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):  # of the environment
                    del words[0]
                if words := [word for word in words if word not in _AND_SO_ON]:
                    found.append((place, words))
    return found
