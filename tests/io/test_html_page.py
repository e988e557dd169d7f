"""Pages are self-contained and escape hostile text."""

import html.parser
import io

import pytest
from PIL import Image

from medmax_jax.io import html_page

HOSTILE = "\"><script>alert('x')</script><img src=http://x onerror=y>&"


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "PNG")
    return file.getvalue()


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    return tags


def test_hostile_text_is_escaped_everywhere():
    body = html_page.section(
        HOSTILE,
        html_page.paragraph(HOSTILE)
        + html_page.table([HOSTILE], [[HOSTILE]], caption=HOSTILE)
        + html_page.figures([(png(), HOSTILE)])
        + html_page.provenance({"seed": HOSTILE, "split": None, "adapter": ""})
        + html_page.verdicts([html_page.Verdict("bad", HOSTILE, HOSTILE)])
        + html_page.table([HOSTILE], [[HOSTILE]], definitions={HOSTILE: HOSTILE}),
    )
    tags = parsed(html_page.document(HOSTILE, body))
    assert not [t for t, _ in tags.tags if t in ("script", "iframe", "link", "form", "a")]
    images = [attrs for tag, attrs in tags.tags if tag == "img"]
    assert len(images) == 1 and images[0]["alt"] == HOSTILE
    assert images[0]["src"].startswith("data:image/png;base64,")
    assert not any(name.startswith("on") for _, attrs in tags.tags for name in attrs)
    # title, h1, h2, p, caption, th, td, figcaption, head, verdict's label and text, th, td
    assert tags.text.count(HOSTILE) == 13
    assert [a["title"] for t, a in tags.tags if t == "abbr"] == [HOSTILE] * 2


def test_the_policy_forbids_everything_but_inline_style_and_data_images():
    tags = parsed(html_page.document("t", "")).tags
    policy = [a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "url(" not in html_page.STYLE and "@import" not in html_page.STYLE


def test_intervals_and_dashes_align_with_numbers():
    text = html_page.table(["a", "b", "c"], [["0.1–0.2", 1.5, "x"], [None, None, None]])
    assert '<td class="number">0.1–0.2</td><td class="number">1.500</td><td>x</td>' in text
    assert '<td class="number">–</td><td class="number">–</td><td>–</td>' in text
    assert '<th scope="col" class="number">a</th>' in text and '<th scope="col">c</th>' in text


def test_table_cells():
    text = html_page.table(["a", "b", "c", "d"], [[0.5, 3, None, True]])
    assert '<td class="number">0.500</td><td class="number">3</td><td>–</td><td>True</td>' in text
    with pytest.raises(ValueError, match="row 0 has 1 cells, but the head has 2"):
        html_page.table(["a", "b"], [["x"]])


def test_terms_with_a_definition_are_abbreviations():
    text = html_page.table(["n", "x"], [[3, "ece"]], definitions={"n": "items", "ece": "gap"})
    assert '<abbr title="items">n</abbr>' in text and '<abbr title="gap">ece</abbr>' in text
    assert "<abbr" not in html_page.table(["n"], [["ece"]])


def test_long_texts_break_into_lines_and_short_ones_do_not():
    text = html_page.table(["", ""], [["prompt", "one " * 20], ["answer", "a\nb"]])
    assert text.count('<td class="text">') == 2 and "<td>prompt</td>" in text
    assert "<thead" not in text  # a head without text
    assert "anywhere" not in html_page.STYLE  # words are not broken


def test_an_image_links_to_its_full_file_below_the_page():
    (attrs,) = [
        a
        for t, a in parsed(html_page.figures([(png(), "x")], links=['a "b"/javascript:c.png'])).tags
        if t == "a"
    ]
    assert attrs == {"href": "a%20%22b%22/javascript%3Ac.png"}
    for link in ("/etc/passwd", "//host/x", "../x.png"):
        with pytest.raises(ValueError, match="below the folder of the page"):
            html_page.figure(png(), "x", link=link)


@pytest.mark.parametrize("size, shown", [(64, 256), (100, 300), (255, 510), (256, 256), (300, 300)])
def test_small_images_are_enlarged_by_integer_factors(size, shown):
    data = html_page.png(Image.new("RGB", (size, size // 2)))
    assert Image.open(io.BytesIO(data)).size == (size, size // 2)  # the page enlarges, not the file
    height = shown // size * (size // 2)
    assert f'width="{shown}" height="{height}"' in html_page.figure(data, "x")


def test_a_figure_must_be_png():
    with pytest.raises(ValueError, match="not a PNG"):
        html_page.figure(b"GIF89a", "x")
