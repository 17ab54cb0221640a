"""The parts that every page of the report is made of: one HTML file that loads nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from dualray import __version__
from dualray.errors import RunError


def page(*, heading: str, name: str, facts: str, sections: Iterable[str], tiles: str = "") -> str:
    """The whole page. `heading` says what kind it is and `name` what it is about, both as text;
    the rest is HTML."""
    template = resources.files("dualray.platform").joinpath("templates", "report.html")
    return Template(template.read_text(encoding="utf-8")).substitute(
        heading=escape(heading),
        name=escape(name),
        facts=facts,
        tiles=tiles,
        sections="\n".join(sections),
        version=escape(__version__),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts."""
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def term_list(rows: Iterable[tuple[str, str]]) -> str:
    """Terms and their descriptions, for the head of the page."""
    return "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in rows)


def check_target(target: Path, example: str) -> None:
    """Raises RunError unless a page can be written to `target`; asked before the work begins."""
    if target.is_dir():
        raise RunError(
            f"--out is {target} and that is a folder",
            hint=f"name a file, such as {target / example}",
        )
    if not target.parent.is_dir():
        raise RunError(
            f"--out is {target} and {target.parent} is not a folder",
            hint="create that folder first, or name a file elsewhere",
        )


def write(target: Path, text: str) -> None:
    """Replace the file as a whole. Raises RunError if that is refused."""
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {target} ({error.strerror})",
            hint="choose a writable place with --out FILE",
        ) from None
