"""Write the parts of the page that are HTML of our own: head, figures, tables, style.

Images are data URLs, so that none of them becomes a file. Every text is escaped.
"""

import html
from collections.abc import Mapping, Sequence

import PIL.Image

from medmax_jax.generation.output_files import NOTICE, png_with_notice
from medmax_jax.io import html_page

SHOWN = 1_024  # pixels of the longer side of an image that was uploaded
# The colors are those of gradio's theme, which has a light and a dark set.
STYLE = """
.gradio-container { max-width: 76rem !important; margin: 0 auto !important; }
.gradio-container > main { padding: 1rem !important; }
#examples, #examples .grid-wrap { height: auto !important; max-height: none !important;
  min-height: 0 !important; }
#examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); height: auto; }
#examples .caption-label { left: 0; right: 0; bottom: 0; max-width: none; padding: .1rem .3rem;
  border-radius: 0; font-size: .7rem; text-align: center; }
@media (max-width: 40rem) { #chat { height: 22rem !important; }
  #examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
#upload .or { color: var(--body-text-color); }
#chat .icon-button-wrapper { display: none; }
.dark { --color-accent: var(--primary-400); }
.notice { border: 1px solid var(--border-color-primary); border-left: .3rem solid #b4552d;
  border-radius: .3rem; padding: .45rem .8rem; margin: .4rem 0;
  background: var(--block-background-fill); color: var(--body-text-color); }
.head h1 { font-size: 1.5rem; margin: 0; }
.head p { margin: .3rem 0; color: var(--body-text-color); }
.part p { margin: .4rem 0; color: var(--body-text-color); }
.part p.problem { border: 1px solid var(--border-color-primary); padding: .4rem .7rem;
  border-left: .3rem solid #c8372d; border-radius: .3rem; overflow-wrap: anywhere; }
.part .figures { display: flex; flex-wrap: wrap; gap: 1rem; }
.part figure { margin: 0; max-width: 100%; }
.part img { display: block; max-width: 100%; max-height: 24rem; height: auto;
  object-fit: contain; border-radius: .3rem; image-rendering: pixelated; }
.part figcaption { font-size: .85rem; margin-top: .3rem; color: var(--body-text-color); }
.part .scroll { overflow-x: auto; }
.part table { border-collapse: collapse; width: 100%; color: var(--body-text-color); }
.part caption { text-align: left; padding: .3rem 0; }
.part table, .part tr { border: 0 !important; }
.part th, .part td { text-align: left; padding: .35rem .7rem; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
.part td.number, .part th.number { text-align: right; font-variant-numeric: tabular-nums; }
footer { display: none !important; }
"""


def head(facts: Mapping[str, str]) -> str:
    """Return the title, the notice and the facts about the model."""
    shown = " · ".join(f"{html.escape(k)}: {html.escape(v)}" for k, v in facts.items() if v)
    return (
        f'<div class="head"><h1>MedMax demo</h1><p>{shown}</p>'
        f'<p class="notice" role="note"><b>{html.escape(NOTICE)}</b> Answers and images are '
        "generated and can be wrong. Uploads stay in the memory of this machine: their file is "
        "deleted when it has been read.</p></div>"
    )


def figures(images: Sequence[tuple[PIL.Image.Image, str]], *, generated: bool = False) -> str:
    """Return images with their captions, next to each other where there is space.

    Generated images are complete and have the notice in their metadata, for those who store them.
    """
    png = png_with_notice if generated else lambda image: html_page.png(_reduced(image))
    shown = [html_page.figure(png(image), caption) for image, caption in images]
    return f'<div class="part"><div class="figures">{"".join(shown)}</div></div>'


def paragraph(text: str) -> str:
    """Return a line of text."""
    return f'<div class="part"><p>{html.escape(text)}</p></div>'


def problem(text: str) -> str:
    """Return an error, which screen readers read out."""
    return f'<div class="part"><p class="problem" role="alert">{html.escape(text)}</p></div>'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; numbers are on the right."""
    return f'<div class="part">{html_page.table(head, rows, caption=caption)}</div>'


def _reduced(image: PIL.Image.Image) -> PIL.Image.Image:
    if max(image.size) <= SHOWN:
        return image
    image = image.copy()
    image.thumbnail((SHOWN, SHOWN), PIL.Image.Resampling.LANCZOS)
    return image
