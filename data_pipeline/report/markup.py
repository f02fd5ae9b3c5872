"""Pieces of HTML. Whatever comes from outside, such as a file's name, goes through ``escape``."""

import base64
from collections.abc import Sequence
from html import escape as escape

from data_pipeline.report.style import STYLE


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole file that needs nothing beside it.

    Args:
        lead: HTML below the title.
        sections: (anchor, title, HTML); those without HTML are left out.
    """
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in shown)
    bodies = "".join(f'<h2 id="{anchor}">{escape(name)}</h2>{body}\n' for anchor, name, body in shown)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lead}</header>\n<nav><div>{links}</div></nav>\n<main>\n{bodies}</main>\n"
        "</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, wrap: Sequence[int] = ()) -> str:
    """Cells are HTML, or whole ``<td>`` elements; the first column and those of ``wrap`` are text."""
    text = {0, *wrap}
    top = "".join(f"<th{' class=text' if i in text else ''}>{escape(head)}</th>" for i, head in enumerate(heads))
    body = "".join(f"<tr>{''.join(_cell(cell, i in wrap) for i, cell in enumerate(row))}</tr>" for row in rows)
    return f'<div class="card scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: str, wraps: bool) -> str:
    if cell.startswith("<td"):
        return cell
    return f'<td class="text wrap">{cell}</td>' if wraps else f"<td>{cell}</td>"


def bar(*parts: tuple[str, float]) -> str:
    """(class, share of the whole) side by side."""
    inside = "".join(f'<i class="{kind}" style="width:{100 * share:.2f}%"></i>' for kind, share in parts if share > 0)
    return f'<div class="bar">{inside}</div>'


def key(*entries: tuple[str, str]) -> str:
    """What the colours mean."""
    return "<small>" + "".join(f'<span class="key {kind}"></span>{escape(name)}' for kind, name in entries) + "</small>"


def figure(jpeg: bytes | None, title: str, below: str, *, about: str, kind: str = "") -> str:
    """A picture with two lines of text; ``about`` is what the pointer shows."""
    inside = "<span>no picture</span>"
    if jpeg is not None:
        data = base64.b64encode(jpeg).decode()
        inside = f'<img src="data:image/jpeg;base64,{data}" alt="{escape(below)}">'
    opening = f'<figure class="{kind}" title="{escape(about)}">' if kind else f'<figure title="{escape(about)}">'
    caption = f"<figcaption><b>{escape(title)}</b><span>{escape(below)}</span></figcaption>"
    return f'{opening}<div class="picture">{inside}</div>{caption}</figure>'
