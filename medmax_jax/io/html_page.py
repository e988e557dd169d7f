"""Self-contained HTML pages: no script, no request, all text escaped, images embedded.

    document("Title", section("Scores", table(["task", "n"], [["closed", 12]])))

`browser` and `sortable_table` are the exceptions: each has one script, which the page allows by its
hash, and without which all content is there. The images of a `browser`, for thousands of entries,
are files below the folder of the page, loaded when an entry is opened.

No page scrolls sideways: a table that is wider than the page scrolls inside itself, with a fixed
first column, and so does a wide chart on a phone.

Only the functions here create markup, and each escapes its arguments, so text that a model
generated can be shown unchanged.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
import struct
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import PIL.Image

SHOWN = 256  # least pixels of an image's longer side; smaller ones are enlarged by integer factors
NARROW = 360  # points of a chart's width that fit on a phone
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
p.head + p.head { margin-top: -1.2rem; }
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
.names td:first-child { width: 1%; padding-right: 1.5rem; }
.names td.text:first-child { min-width: 18rem; }
th.number { text-align: right; white-space: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.names td.number { text-align: left; }
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
figure.chart svg { width: calc(var(--points) * 1.6px); max-width: 100%; margin: 0 auto; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; }
  td.text { min-width: 13rem; }
  td.text:first-child, .names td.text:first-child { min-width: 7rem; }
  figure.chart { overflow-x: auto; }
  figure.chart svg { width: calc(var(--points) * 1.2px); max-width: none; }
  figure.narrow svg { max-width: 100%; }
  form.filters { position: static; } }
details { margin: .6rem 0 1.5rem; }
summary { color: var(--soft); font-size: .9rem; cursor: pointer; }
[hidden] { display: none !important; }
.filters { display: flex; flex-wrap: wrap; gap: .75rem 1.25rem; align-items: baseline;
  position: sticky; top: 0; padding: .6rem 0; background: var(--page); z-index: 1; }
.filters select { font: inherit; max-width: 14rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--soft); border-radius: .3rem; padding: .15rem .3rem; }
.entry { margin: 0; padding: .35rem 0; border-bottom: 1px solid var(--line);
  content-visibility: auto; contain-intrinsic-size: auto 2.4rem; }
.entry summary { color: var(--ink); }
.entry b { display: inline-block; min-width: 5.5rem; color: var(--soft); }
.entry b.good { color: var(--good); }
.entry b.bad { color: var(--bad); }
.entry img { width: 16rem; }
td small { display: block; color: var(--soft); font-size: .8rem; }
td small + small { color: var(--ink); }
th button { font: inherit; color: inherit; text-align: inherit; background: none; border: 0;
  padding: 0; cursor: pointer; }
th button::after { content: " ↕"; font-weight: 400; }
th[aria-sort] button::after { content: " ↓"; color: var(--mark); }
th[aria-sort=ascending] button::after { content: " ↑"; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .45rem; }
"""


# Shows the entries of a `browser` that have the selected values; the values after # in the address
# are selected first: items.html#task=vqa_closed&verdict=wrong.
SCRIPT = """
const form = document.querySelector("form.filters");
const entries = [...document.querySelectorAll("details.entry")];
const values = entries.map(entry => JSON.parse(entry.dataset.values));
function apply() {
  const wanted = [...new FormData(form)].filter(([name, value]) => value);
  let shown = 0;
  entries.forEach((entry, number) => {
    entry.hidden = !wanted.every(([name, value]) => values[number][name].includes(value));
    shown += !entry.hidden;
  });
  form.querySelector("output").textContent = `${shown} of ${entries.length} items`;
}
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  const select = form.elements.namedItem(name);
  if (select) select.value = value;
}
form.addEventListener("change", apply);
form.hidden = false;
apply();
"""
# Sorts a `sortable_table` by the column whose head is selected; cells without a value stay last.
SORT_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const value = row => row.cells[column].dataset.value;
      const numeric = head.classList.contains("number");
      const before = head.ariaSort ?? (numeric ? "ascending" : "descending");
      const down = before === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => numeric ? a - b : a.localeCompare(b);
      body.append(...[...body.rows].sort((one, two) => {
        const a = value(one), b = value(two);
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return down ? order(b, a) : order(a, b);
      }));
    });
  });
}
"""


def script_policy(script: str) -> str:
    """Return the policy of a page that runs this script and no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; form-action 'none'"
    )


class Entry(NamedTuple):
    """An entry of a `browser`: its values by the name of the filter, and markup as its body."""

    title: str
    label: str
    status: Status
    values: Mapping[str, Sequence[str]]
    body: str


class SortedCell(NamedTuple):
    """A cell of a `sortable_table`: its text, smaller lines below it, and what it is sorted by.

    A column is sorted by number if all of its values are numbers; None: the cell has no value.
    """

    text: str
    value: float | str | None
    lines: tuple[str, ...] = ()


class Verdict(NamedTuple):
    """A result in words, `label`, with the sentence that supports it; `status` is its color."""

    status: Status
    label: str
    text: str


def document(title: str, body: str, *, script: str = "") -> str:
    """Return the page; `body` is markup made by the functions below, `title` is text.

    script: of a page with a `browser` SCRIPT, of one with a `sortable_table` SORT_SCRIPT.
    """
    safe, policy = html.escape(title), script_policy(script) if script else POLICY
    script = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{safe}</h1>\n{body}</main>\n{script}</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a heading followed by markup."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}</section>\n"


def paragraph(text: str, *, note: bool = False) -> str:
    """Return a paragraph of text; `note` makes it smaller and softer."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{html.escape(text)}</p>\n"


def provenance(facts: Mapping[str, object]) -> str:
    """Return one line of small text below the title: what made the results, and from what.

    facts: name -> value, for example {"seed": 0} and those of environment.py; facts whose value
    is empty are left out.
    """
    parts = [f"{name} {value}" for name, value in facts.items() if value not in (None, "")]
    return f'<p class="head">{" · ".join(map(html.escape, parts))}</p>\n'


def links(targets: Mapping[str, str]) -> str:
    """Return links to files next to the page; targets: name of the file -> text."""
    parts = (f'<a href="{_href(link)}">{html.escape(text)}</a>' for link, text in targets.items())
    return f"<p>{' · '.join(parts)}</p>\n"


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
    dash. A head of empty texts is left out, for a table whose first column has the names.

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
    kind = "" if thead else ' class="names"'
    return (
        f'<div class="scroll" tabindex="0"><table{kind}>{title}\n{thead}'
        f"<tbody>\n{lines}</tbody></table></div>\n"
    )


def sortable_table(
    head: Sequence[str],
    rows: Sequence[Sequence[SortedCell]],
    *,
    definitions: Mapping[str, str] | None = None,
) -> str:
    """Return a table whose heads sort it when they are selected; see `document` for its script."""
    columns = list(zip(*rows, strict=True))
    numeric = [all(not isinstance(cell.value, str) for cell in column) for column in columns]
    top = "".join(
        _head(name, number, definitions or {}) for name, number in zip(head, numeric, strict=True)
    )
    lines = ""
    for row in rows:
        cells = "".join(map(_sorted_cell, row, numeric))
        lines += f"<tr>{cells}</tr>\n"
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable">\n<thead><tr>{top}</tr></thead>'
        f"\n<tbody>\n{lines}</tbody></table></div>\n"
    )


def _sorted_cell(cell: SortedCell, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    value = "" if cell.value is None else f' data-value="{html.escape(str(cell.value))}"'
    small = "".join(f"<small>{html.escape(line)}</small>" for line in cell.lines)
    return f"<td{kind}{value}>{html.escape(cell.text)}{small}</td>"


def figure(png_bytes: bytes, caption: str, *, link: str = "") -> str:
    """Return a PNG with its caption, which is also the alternative text.

    An image smaller than SHOWN is shown enlarged by an integer factor.

    link: path of the full image, relative to the page.
    """
    if not png_bytes.startswith(b"\x89PNG\r\n\x1a\n") or len(png_bytes) < 24:
        raise ValueError(f"figure {caption!r}: not a PNG; save the image with format='PNG'")
    data, safe = base64.b64encode(png_bytes).decode("ascii"), html.escape(caption)
    width, height = struct.unpack(">II", png_bytes[16:24])
    factor = math.ceil(SHOWN / max(width, height, 1))
    size = f'width="{width * factor}" height="{height * factor}"'
    image = f'<img alt="{safe}" {size} src="data:image/png;base64,{data}">'
    if link:
        image = f'<a href="{_href(link)}">{image}</a>'
    return f"<figure>{image}<figcaption>{safe}</figcaption></figure>\n"


def chart(svg: str, caption: str) -> str:
    """Return a chart of io/charts.py with its caption, which is also the alternative text.

    Text has about the same size in all charts. On a phone, a chart of up to NARROW points is as
    wide as the page, and a wider one scrolls inside its figure.
    """
    view = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
    if view is None:
        raise ValueError(f"chart {caption!r} has no viewBox; draw it with io/charts.py")
    points = float(view[1])
    kind, focus = ("chart narrow", "") if points <= NARROW else ("chart", ' tabindex="0"')
    return (
        f'<figure class="{kind}" style="--points: {points:g}"{focus}>{_labeled(svg, caption)}'
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


def linked_figures(images: Sequence[tuple[str, str]]) -> str:
    """Return several (path relative to the page, caption), each loaded when it becomes visible."""
    cells = ""
    for link, caption in images:
        safe, href = html.escape(caption), _href(link)
        image = f'<a href="{href}"><img alt="{safe}" loading="lazy" src="{href}"></a>'
        cells += f"<figure>{image}<figcaption>{safe}</figcaption></figure>\n"
    return f'<div class="figures">\n{cells}</div>\n'


def browser(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the markup of entries that open when selected, with a filter for each of their values.

    All entries are in the page: without its script it shows them unfiltered. The parts are written
    one by one: of ten thousand entries, each copy of the whole takes tens of megabytes.
    """
    options: dict[str, set[str]] = {}
    for entry in entries:
        for name, values in entry.values.items():
            options.setdefault(name, set()).update(values)
    selects = "".join(_select(name, sorted(values)) for name, values in options.items() if values)
    yield f'<form class="filters" hidden>{selects}<output></output></form>\n'
    for entry in entries:
        yield (
            f'<details class="entry" data-values="{html.escape(json.dumps(entry.values))}">'
            f'<summary><b class="{entry.status}">{html.escape(entry.label)}</b> '
            f"{html.escape(entry.title)}</summary>\n{entry.body}</details>\n"
        )


def _select(name: str, values: Sequence[str]) -> str:
    safe = html.escape(name)
    options = "".join(f"<option>{html.escape(value)}</option>" for value in values)
    return (
        f'<label>{safe} <select name="{safe}"><option value="">all</option>{options}</select>'
        "</label>\n"
    )


def _href(link: str) -> str:
    """Return a path below the folder of the page as an attribute's value."""
    if link.startswith(("/", "..")):
        raise ValueError(f"link is {link!r}; required: a path below the folder of the page")
    return html.escape(urllib.parse.quote(link))


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
    if not name:
        return "<td></td>"
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
