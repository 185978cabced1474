"""The report: one HTML file that holds every picture, so that it can be moved, mailed and opened without a network."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from scalecryo.evaluate.report.surface import Surface
from scalecryo.evaluate.verdict import Verdict

PANELS_PX = 1000  # a picture at least so wide holds more panels than a phone can show at once


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        title: its heading.
        text: plain, lines kept; may be empty.
        png: a picture, or None.
        caption: of the picture.
        body: markup that comes before text and picture; made by `table_html`, `paragraphs_html` and `viewer_html`.
        folded: whether the text is shown only when it is asked for.
        name: of the picture's file in the run's folder, without its ending; empty: it is in the page alone.
    """

    title: str
    text: str = ""
    png: bytes | None = None
    caption: str = ""
    body: str = ""
    name: str = ""
    folded: bool = False


def report_html(title: str, sections: Sequence[Section], verdict: Verdict | None = None) -> str:
    """The whole page.

    Args:
        title: of the page.
        sections: in order.
        verdict: that the page begins with, or None.
    """
    links, body = _numbered(sections, 0)
    parts = [] if verdict is None else [_verdict_html(verdict)]
    parts += [f"<nav>{links}</nav>", body]
    if any('class="surface"' in section.body for section in sections):
        parts.append(f"<script>\n{_packaged('viewer.js')}</script>")
    return _PAGE.format(title=html.escape(title), style=_packaged("page.css"), body="\n".join(parts))


def with_sections(page: str, sections: Sequence[Section]) -> str:
    """A page that `report_html` made, with more sections at its end."""
    links, body = _numbered(sections, page.count(_BEGIN))
    page = page.replace(_END_OF_LINKS, links + _END_OF_LINKS, 1)
    at = page.rindex(_END_OF_PAGE)
    return f"{page[:at]}{body}\n{page[at:]}"


def _numbered(sections: Sequence[Section], first: int) -> tuple[str, str]:
    """Links to sections, and the sections, named by their numbers from `first` on."""
    links, body = [], []
    for number, section in enumerate(sections, first):
        links.append(f'<a href="#s{number}">{html.escape(section.title)}</a> ')
        body.append(_section_html(f"s{number}", section))
    return "".join(links), "\n".join(body)


def table_html(rows: Mapping[str, str]) -> str:
    """Two columns: a heading and its value, both plain text."""
    lines = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{lines}</table>"


def paragraphs_html(*texts: str) -> str:
    """Plain texts as paragraphs."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts if text)


def viewer_html(surface: Surface) -> str:
    """A map that is turned with mouse or finger, with a slider for its contour; viewer.js draws it."""
    data = surface.data()
    attributes = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in data.items())
    step = (float(data["high"]) - float(data["low"])) / 500
    sides = "".join(f'<button value="{axis}" type="button">along {axis}</button>' for axis in "zyx")
    return (
        f'<div class="surface" {attributes}><canvas aria-label="the map as a surface: drag to turn, wheel or two '
        'fingers to zoom"></canvas><div class="controls"><label>contour</label>'
        f'<input type="range" min="{data["low"]}" max="{data["high"]}" step="{step:.6g}" value="{data["level"]}" '
        f'aria-label="contour">{sides}<button value="mirror" type="button">mirror</button>'
        '<button value="reset" type="button">reset</button></div><output></output></div>'
    )


def _verdict_html(verdict: Verdict) -> str:
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)
    tiles = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in verdict.figures.items()
    )
    return (
        f'<div class="verdict {verdict.grade}"><h2>{html.escape(verdict.headline)}</h2>'
        f"{paragraphs_html(verdict.text)}{f'<ul>{reasons}</ul>' if reasons else ''}</div>"
        + (f'<dl class="tiles">{tiles}</dl>' if tiles else "")
    )


def _section_html(name: str, section: Section) -> str:
    parts = [f'{_BEGIN}"{name}">\n<h2>{html.escape(section.title)}</h2>', section.body]
    if section.text:
        text = f"<pre>{html.escape(section.text)}</pre>"
        parts.append(f"<details><summary>show</summary>{text}</details>" if section.folded else text)
    if section.png is not None:
        data = base64.b64encode(section.png).decode("ascii")
        # On a phone panels side by side would be unreadable in its width: they are scrolled sideways there.
        panels = ' class="panels"' if int.from_bytes(section.png[16:20], "big") >= PANELS_PX else ""
        image = f'<img{panels} alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">'
        caption = f"<figcaption>{html.escape(section.caption)}</figcaption>" if section.caption else ""
        parts.append(f"<figure>{image}{caption}</figure>")
    return "\n".join([*filter(None, parts), "</section>"])


def _packaged(name: str) -> str:
    return (files("scalecryo.evaluate.report") / name).read_text(encoding="utf-8")


_BEGIN, _END_OF_LINKS, _END_OF_PAGE = "<section id=", "</nav>", "</body>"
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
