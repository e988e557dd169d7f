"""Self-contained HTML pages: no script, no request, all text escaped, images embedded.

    document("Title", section("Scores", table(["task", "n"], [["closed", 12]])))

No page scrolls sideways: a table that is wider than the page scrolls inside itself, with a fixed
first column, and so does a wide chart on a phone.

Only the functions here create markup, and each escapes its arguments, so text that a model
generated can be shown unchanged.
"""

import base64
import html
import io
import math
import re
import struct
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import PIL.Image

SHOWN = 256  # least pixels of an image's longer side; smaller ones are enlarged by integer factors
LONG = 24  # characters of a cell: longer texts break into lines between words
NOTHING = "–"  # a cell without a value
NO_BREAK = "\xa0"  # a space at which no line ends
_NUMBER = r"-?[\d,.]*\d%?"
# 1,034, 56.4%, 0.31–0.42, -1 to 2, each with a mark or without: 0.31–0.42 †
_FIGURE = re.compile(rf"{_NUMBER}(?:(?:–| to ){_NUMBER})?(?: †)?")
Status = Literal["good", "bad", "neutral"]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark;
  --ink: light-dark(#1d2430, #e4e8ee); --soft: light-dark(#5b6675, #9aa6b5);
  --line: light-dark(#d9dee5, #353d49); --page: light-dark(#fbfcfd, #14181e);
  --card: light-dark(#fff, #1b2129); --mark: light-dark(#0b6e69, #57c7bf);
  --good: light-dark(#1a7037, #6fca8c); --bad: light-dark(#b3261e, #ff9a90);
  --series-1: light-dark(#b4552d, #e38f69); --series-2: light-dark(#3b5b92, #8aa9e0);
  --series-3: light-dark(#a58a1f, #d9bf57); --series-4: light-dark(#7a4a88, #c196cf);
  --series-5: light-dark(#5f6b78, #a3afbc); --series-6: light-dark(#2f8f4e, #6fca8c);
  --series-7: light-dark(#c2568b, #ea94bd); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 2px solid var(--mark); }
p { margin: .6rem 0; max-width: 46rem; }
p.note { color: var(--soft); font-size: .9rem; }
p.head { color: var(--soft); font-size: .85rem; max-width: none; margin: 0 0 1.5rem; }
.verdicts { list-style: none; margin: 1rem 0; padding: 0; max-width: 52rem; }
.verdicts li { margin: .5rem 0; padding: .45rem .8rem; background: var(--card);
  border: 1px solid var(--line); border-left: .3rem solid var(--soft); border-radius: .3rem; }
.verdicts li.good { border-left-color: var(--good); }
.verdicts li.bad { border-left-color: var(--bad); }
.verdicts b { color: var(--soft); }
.verdicts .good b { color: var(--good); }
.verdicts .bad b { color: var(--bad); }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .92rem; width: 100%; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding: .2rem 0 .5rem;
  position: sticky; left: 0; max-width: calc(100vw - 2rem); }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; overflow-wrap: normal;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.text { white-space: pre-line; min-width: 14rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page);
  padding-left: 0; }
td.text:first-child { min-width: 9rem; }
th.number { text-align: right; white-space: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
abbr[title] { text-decoration: underline dotted; text-underline-offset: .2em; cursor: help; }
.figures { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(17.5rem, 100%), 1fr)); }
figure { margin: 1rem 0; padding: .6rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.figures figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.figures img { image-rendering: pixelated; }
a { color: var(--mark); }
.tiles { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.tile { padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.columns { display: grid; grid-template-columns: 17.5rem minmax(0, 1fr); gap: 1.25rem;
  align-items: start; margin: 1.25rem 0; }
.columns > div { min-width: 0; }
.columns .figures { grid-template-columns: 1fr; }
.columns th:first-child { width: 6rem; }
@media (max-width: 48rem) { .columns { grid-template-columns: minmax(0, 1fr); } }
.charts { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.charts figure { margin: 0; }
.charts figcaption b { display: block; color: var(--ink); font-size: .95rem; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
figure.chart svg { max-width: 58rem; margin: 0 auto; }
figure.narrow svg { max-width: 40rem; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; }
  td.text { min-width: 13rem; } td.text:first-child { min-width: 7rem; }
  figure.chart { overflow-x: auto; } figure.chart svg { min-width: 36rem; }
  figure.narrow svg { min-width: 0; } }
details { margin: .6rem 0 1.5rem; }
summary { color: var(--soft); font-size: .9rem; cursor: pointer; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .45rem; }
"""


class Verdict(NamedTuple):
    """A result in words, `label`, with the sentence that supports it; `status` is its color."""

    status: Status
    label: str
    text: str


def document(title: str, body: str) -> str:
    """Return the page; `body` is markup made by the functions below, `title` is text."""
    safe = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{safe}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a heading followed by markup."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}</section>\n"


def paragraph(text: str, *, note: bool = False) -> str:
    """Return a paragraph of text; `note` makes it smaller and softer."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{html.escape(text)}</p>\n"


def provenance(parts: Sequence[str]) -> str:
    """Return one line of small text below the title: what made the page, and from what."""
    return f'<p class="head">{" · ".join(map(html.escape, parts))}</p>\n'


def verdicts(items: Sequence[Verdict]) -> str:
    """Return a list of results, each with its label in bold and in the color of its status."""
    lines = "".join(
        f'<li class="{item.status}"><b>{html.escape(item.label)}.</b> '
        f"{html.escape(item.text.replace(' %', NO_BREAK + '%'))}</li>\n"
        for item in items
    )
    return f'<ul class="verdicts">\n{lines}</ul>\n' if items else ""


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    caption: str = "",
    definitions: Mapping[str, str] | None = None,
) -> str:
    """Return a table, which scrolls inside itself where it is wider than the page.

    Numbers and columns of numbers are right-aligned, floats are rounded to 0.001, and None is a
    dash. A head of empty texts is left out.

    definitions: text of a head or a cell -> its definition, shown when it is pointed at.
    """
    definitions = definitions or {}
    for number, row in enumerate(rows):
        if len(row) != len(head):
            raise ValueError(f"row {number} has {len(row)} cells, but the head has {len(head)}")
    figures = [_numeric([format_value(cell) for cell in column]) for column in zip(*rows)]  # noqa: B905
    top = "".join(
        _head(name, numeric, definitions)
        for name, numeric in zip(head, figures or [False] * len(head), strict=True)
    )
    lines = ""
    for row in rows:
        cells = (_cell(v, numeric, definitions) for v, numeric in zip(row, figures, strict=True))
        lines += f"<tr>{''.join(cells)}</tr>\n"
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    thead = f"<thead><tr>{top}</tr></thead>\n" if any(head) else ""
    return (
        f'<div class="scroll" tabindex="0"><table>{title}\n{thead}'
        f"<tbody>\n{lines}</tbody></table></div>\n"
    )


def figure(png_bytes: bytes, caption: str, *, link: str = "") -> str:
    """Return a PNG with its caption, which is also the alternative text.

    An image smaller than SHOWN is shown enlarged by an integer factor.

    link: path of the full image, relative to the page.
    """
    if link.startswith(("/", "..")):
        raise ValueError(f"link is {link!r}; required: a path below the folder of the page")
    if not png_bytes.startswith(b"\x89PNG\r\n\x1a\n") or len(png_bytes) < 24:
        raise ValueError(f"figure {caption!r}: not a PNG; save the image with format='PNG'")
    data, safe = base64.b64encode(png_bytes).decode("ascii"), html.escape(caption)
    width, height = struct.unpack(">II", png_bytes[16:24])
    factor = math.ceil(SHOWN / max(width, height, 1))
    size = f'width="{width * factor}" height="{height * factor}"'
    image = f'<img alt="{safe}" {size} src="data:image/png;base64,{data}">'
    if link:
        image = f'<a href="{html.escape(urllib.parse.quote(link))}">{image}</a>'
    return f"<figure>{image}<figcaption>{safe}</figcaption></figure>\n"


def chart(svg: str, caption: str, *, narrow: bool = False) -> str:
    """Return a chart of io/charts.py with its caption, which is also the alternative text.

    narrow: for charts of up to 5 inches, which stay readable on a phone.
    """
    kind = "chart narrow" if narrow else "chart"
    return (
        f'<figure class="{kind}">{_labeled(svg, caption)}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
    )


def charts(items: Sequence[tuple[str, str, str]]) -> str:
    """Return several (SVG, title, caption) in as many columns as fit on the page."""
    cells = ""
    for svg, title, caption in items:
        text = f"<b>{html.escape(title)}</b>{html.escape(caption)}"
        figure_markup = _labeled(svg, f"{title}: {caption}")
        cells += f"<figure>{figure_markup}<figcaption>{text}</figcaption></figure>\n"
    return f'<div class="charts">\n{cells}</div>\n'


def _labeled(svg: str, text: str) -> str:
    """Return a chart with its alternative text."""
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(text)}" ', 1)


def figures(images: Sequence[tuple[bytes, str]], *, links: Sequence[str] = ()) -> str:
    """Return several (PNG, caption) in a grid; links: of each one to its full image, or empty."""
    cells = (
        figure(data, caption, link=link)
        for (data, caption), link in zip(images, links or [""] * len(images), strict=True)
    )
    return f'<div class="figures">\n{"".join(cells)}</div>\n'


def png(image: PIL.Image.Image) -> bytes:
    """Return the bytes of a PNG file of the image."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def stat_tiles(numbers: Sequence[tuple[object, str]]) -> str:
    """Return large numbers, each above its label."""
    cells = "".join(
        f'<div class="tile"><b>{html.escape(format_value(n))}</b>'
        f"<span>{html.escape(what)}</span></div>\n"
        for n, what in numbers
    )
    return f'<div class="tiles">\n{cells}</div>\n'


def columns(left: str, right: str) -> str:
    """Return two pieces of markup in one row, or one below the other on a narrow page."""
    return f'<div class="columns"><div>{left}</div>\n<div>{right}</div></div>\n'


def details(title: str, body: str) -> str:
    """Return markup that expands when its title is selected; no script is needed."""
    return f"<details><summary>{html.escape(title)}</summary>\n{body}</details>\n"


def format_value(value: object) -> str:
    """Return a value as the tables show it: 0.5 -> "0.500", None -> a dash."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _numeric(cells: Sequence[str]) -> bool:
    """Return whether a column has numbers, and nothing else but dashes."""
    values = [cell for cell in cells if cell != NOTHING]
    return bool(values) and all(_FIGURE.fullmatch(cell) for cell in values)


def _head(name: str, numeric: bool, definitions: Mapping[str, str]) -> str:
    kind = ' class="number"' if numeric else ""
    return f'<th scope="col"{kind}>{_defined(name, definitions)}</th>'


def _cell(value: object, numeric: bool, definitions: Mapping[str, str]) -> str:
    text, kind = format_value(value), ""
    if numeric or (isinstance(value, int | float) and not isinstance(value, bool)):
        kind = ' class="number"'
    elif "\n" in text or (len(text) > LONG and " " in text):
        kind = ' class="text"'
    return f"<td{kind}>{_defined(text, definitions)}</td>"


def _defined(text: str, definitions: Mapping[str, str]) -> str:
    """Return escaped text, with its definition if it has one."""
    if text not in definitions:
        return html.escape(text)
    return f'<abbr title="{html.escape(definitions[text])}">{html.escape(text)}</abbr>'
