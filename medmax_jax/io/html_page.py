"""Self-contained HTML pages: no script, no request, all text escaped, images embedded.

    document("Title", section("Scores", table(["task", "n"], [["closed", 12]])))

Only the functions here create markup, and each escapes its arguments, so text that a model
generated can be shown unchanged.
"""

import base64
import html
import io
import re
from collections.abc import Sequence

import PIL.Image

SHOWN = 192  # pixels of an image on the page; tiny images are enlarged by integer factors
WIDE = 8  # columns: with more, words are not broken and the table scrolls
NOTHING = "–"  # a cell without a value
_NUMBER = r"-?[\d,.]*\d%?"
_FIGURE = re.compile(rf"{_NUMBER}(?:(?:–| to ){_NUMBER})?")  # 1,034, 56.4%, 0.31–0.42, -1 to 2
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark;
  --ink: light-dark(#1d2430, #e4e8ee); --soft: light-dark(#5b6675, #9aa6b5);
  --line: light-dark(#d9dee5, #353d49); --page: light-dark(#fbfcfd, #14181e);
  --card: light-dark(#fff, #1b2129); --mark: light-dark(#0b6e69, #57c7bf);
  --series-1: light-dark(#b4552d, #e38f69); --series-2: light-dark(#3b5b92, #8aa9e0);
  --series-3: light-dark(#a58a1f, #d9bf57); --series-4: light-dark(#7a4a88, #c196cf);
  --series-5: light-dark(#5f6b78, #a3afbc); --series-6: light-dark(#2f8f4e, #6fca8c);
  --series-7: light-dark(#c2568b, #ea94bd); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1.5rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 2px solid var(--mark); }
p { margin: .6rem 0; max-width: 46rem; }
p.note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding: .2rem 0 .5rem; }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { white-space: pre-line; }
td:first-child { min-width: 9.5rem; }
td:nth-child(2) { min-width: 5rem; }
.wide th, .wide td { padding: .4rem .5rem; overflow-wrap: break-word; }
th.number { text-align: right; white-space: normal; overflow-wrap: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
figure { margin: 1rem 0; padding: .6rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.figures figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.figures img { width: 100%; image-rendering: pixelated; }
.tiles { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.tile { padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.columns { display: grid; grid-template-columns: 11rem 1fr; gap: 1.25rem; align-items: start;
  margin: 1.25rem 0; }
.columns .figures { grid-template-columns: 1fr; }
.columns th:first-child { width: 6rem; }
@media (max-width: 40rem) { .columns { grid-template-columns: 1fr; } }
.charts { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.charts figure { margin: 0; }
.charts figcaption b { display: block; color: var(--ink); font-size: .95rem; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
figure.chart svg { max-width: 58rem; margin: 0 auto; }
details { margin: .6rem 0 1.5rem; }
summary { color: var(--soft); font-size: .9rem; cursor: pointer; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .45rem; overflow-wrap: anywhere; }
"""


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


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "") -> str:
    """Return a table.

    Numbers and columns of numbers are right-aligned, floats are rounded to 0.001, and None is a
    dash.
    """
    for number, row in enumerate(rows):
        if len(row) != len(head):
            raise ValueError(f"row {number} has {len(row)} cells, but the head has {len(head)}")
    figures = [_numeric([format_value(cell) for cell in column]) for column in zip(*rows)]  # noqa: B905
    top = "".join(map(_head, head, figures or [False] * len(head)))
    lines = "".join(f"<tr>{''.join(map(_cell, row, figures))}</tr>\n" for row in rows)
    wide = ' class="wide"' if len(head) > WIDE else ""
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table{wide}>{title}\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{lines}</tbody></table></div>\n"
    )


def figure(png_bytes: bytes, caption: str) -> str:
    """Return a PNG with its caption, which is also the alternative text."""
    if not png_bytes.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"figure {caption!r}: not a PNG; save the image with format='PNG'")
    data, safe = base64.b64encode(png_bytes).decode("ascii"), html.escape(caption)
    return (
        f'<figure><img alt="{safe}" src="data:image/png;base64,{data}">'
        f"<figcaption>{safe}</figcaption></figure>\n"
    )


def chart(svg: str, caption: str) -> str:
    """Return a chart of io/charts.py with its caption, which is also the alternative text."""
    safe = html.escape(caption)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{safe}" ', 1)
    return f'<figure class="chart">{svg}<figcaption>{safe}</figcaption></figure>\n'


def charts(items: Sequence[tuple[str, str, str]]) -> str:
    """Return several (SVG, title, caption) in as many columns as fit on the page."""
    cells = ""
    for svg, title, caption in items:
        label = html.escape(f"{title}: {caption}")
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        cells += (
            f"<figure>{svg}<figcaption><b>{html.escape(title)}</b>{html.escape(caption)}"
            "</figcaption></figure>\n"
        )
    return f'<div class="charts">\n{cells}</div>\n'


def figures(images: Sequence[tuple[bytes, str]]) -> str:
    """Return several (PNG, caption) side by side."""
    return f'<div class="figures">\n{"".join(figure(*p) for p in images)}</div>\n'


def png(image: PIL.Image.Image) -> bytes:
    """Return PNG bytes; small images are enlarged by an integer factor to keep pixels visible."""
    factor = max(1, SHOWN // max(image.size))
    out = io.BytesIO()
    image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST).save(
        out, format="PNG"
    )
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


def _head(name: str, figures: bool) -> str:
    kind = ' class="number"' if figures else ""
    return f'<th scope="col"{kind}>{html.escape(name)}</th>'


def _cell(value: object, figures: bool) -> str:
    number = figures or (isinstance(value, int | float) and not isinstance(value, bool))
    kind = ' class="number"' if number else ""
    return f"<td{kind}>{html.escape(format_value(value))}</td>"
