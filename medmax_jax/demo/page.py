"""Lay out the demo page with gradio, and connect it to the engine service.

    image        upload or example, window of a CT          shared by all tabs but the second
    tabs         chat | image from text | adapter | reconstruction | likelihoods

Images reach the browser as data URLs and the server as one upload, whose file is deleted when it
has been read: no image is written to gradio's cache, but those of the embedded sample.
"""

import contextlib
import dataclasses
import html
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medmax_jax.data import sample
from medmax_jax.data.sample.manifest import read_manifest
from medmax_jax.demo import answers, markup, uploads
from medmax_jax.demo.answers import Note, Part, ShownImage, Turn
from medmax_jax.generation import api
from medmax_jax.generation.model_bundle import MAX_PIXELS
from medmax_jax.generation.requests import GenerateError
from medmax_jax.models import images
from medmax_jax.models.image_headers import ImageError
from medmax_jax.models.tokenizer import TokenizerError
from medmax_jax.serving.service import Service
from medmax_jax.serving.tickets import GenerationRequest, ServiceError, Ticket

SAMPLE = Path(sample.__file__).parent
MAX_TEXT, MAX_TOKENS, MAX_SEED = 4_000, 512, 2**32 - 1  # characters of a question; tokens
STOP_S = 30.0  # seconds in which a cancelled request ends: a chunk, or the compilation
CONCURRENT = 16  # handlers that run at once; the service has its own limits
FONTS, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
NO_DOCUMENTATION = dict(docs_url=None, redoc_url=None, openapi_url=None)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]
STATED = "as the file states"  # the window that a file has itself
# Errors whose message is all that the reader of the page needs.
ERRORS = (GenerateError, ImageError, TokenizerError, ServiceError, uploads.UploadError)
WAITING = Note("Generating ... (the first answer of each kind includes the compilation)")
NO_IMAGE = markup.paragraph("No image. The tabs also work with text alone.")
Windows = dict[str, PIL.Image.Image]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a service: the base, and the name of the adapter, if there is one."""

    service: Service
    base: str
    adapter: str
    facts: dict[str, str]  # shown at the top of the page

    @property
    def newest(self) -> str:
        """Return the model that answers where the page shows one answer."""
        return self.adapter or self.base


def build(models: Models) -> gr.Blocks:
    """Return the page."""

    def forget(request: gr.Request) -> None:  # gradio itself would keep a session for an hour
        page.state_holder.session_data.pop(request.session_hash, None)

    with gr.Blocks(title="MedMax demo", analytics_enabled=False, delete_cache=(60, 60)) as page:
        gr.HTML(markup.head(models.facts))
        windows, window = gr.State(None), gr.State("")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                _image_panel(windows, window)
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Chat"):
                    _chat_tab(models, windows, window)
                with gr.Tab("Image from text"):
                    _draw_tab(models)
                if models.adapter:
                    with gr.Tab("Before and after"):
                        _compare_tab(models, windows, window)
                with gr.Tab("Reconstruction"):
                    _reconstruct_tab(models, windows, window)
                with gr.Tab("Likelihoods"):
                    _likelihoods_tab(models, windows, window)
        page.unload(forget)
    return page


def launch(page: gr.Blocks, port: int) -> None:
    """Serve the page on this machine only, until it is closed; raise OSError for a used port."""
    page.queue(default_concurrency_limit=CONCURRENT)
    # Nothing is recorded: no analytics, no history in the browser, no page of the interface. The
    # policy keeps the browser from requests to other machines, whatever a text contains.
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=uploads.MAX_BYTES,
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        theme=_theme(),
        css=markup.STYLE,
        app_kwargs={"middleware": [Middleware(SecurityHeaders)], **NO_DOCUMENTATION},
    )


def _theme() -> gr.themes.Base:
    """Return gradio's theme with the fonts of the system and a contrast of at least 4.5."""
    return gr.themes.Default(primary_hue="teal", font=FONTS, font_mono=MONO).set(
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


class SecurityHeaders:
    """Adds the policy of the page to every response."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and add the headers to its response."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Show an error as a message of the page; it stays until it is closed."""
    try:
        yield
    except ERRORS as error:
        # gradio renders the message as HTML, and it may repeat the reader's text
        message = html.escape(str(error))
        raise gr.Error(message, duration=None, print_exception=False) from error


# ---- The image that all tabs share ----


def _image_panel(windows: gr.State, window: gr.State) -> None:
    upload = gr.File(label="Image: PNG, JPEG, TIFF, ... or DICOM", height=140, elem_id="upload")
    choice = gr.Radio(
        [], label="Window of the CT", visible=False, interactive=True, elem_id="window"
    )
    shown = gr.HTML(NO_IMAGE)
    remove = gr.Button("Remove the image", size="sm", visible=False)
    rows = _examples()
    gr.HTML(markup.paragraph("Or an example, which the shipped models were not trained on:"))
    gallery = gr.Gallery(
        [(SAMPLE / row["file"], _caption(row)) for row in rows], label="Examples", show_label=False,
        columns=3, allow_preview=False, interactive=False, buttons=[], elem_id="examples",
    )  # fmt: skip
    outputs = [windows, window, choice, shown, remove]

    def show(images_by_window: Windows, selected: str, caption: str) -> list[Any]:
        names = [name or STATED for name in images_by_window]
        size = images_by_window[selected].size
        figure = markup.figures([(images_by_window[selected], f"{caption}, {size[0]} x {size[1]}")])
        radio = gr.Radio(names, value=selected or STATED, visible=len(names) > 1)
        return [images_by_window, selected, radio, figure, gr.Button(visible=True)]

    def read(path: str | None) -> list[Any]:
        if path is None:
            return [gr.skip()] * 6
        try:
            return [*show(uploads.read(path), "", "your image"), None]
        except uploads.UploadError as error:  # the panel must accept the next file
            return [*clear(markup.problem(str(error))), None]

    def select(name: str, images_by_window: Windows) -> list[Any]:
        return show(images_by_window, "" if name == STATED else name, "your image")

    def example(event: gr.SelectData) -> list[Any]:
        row = rows[event.index]
        image = images.load(SAMPLE / row["file"], max_pixels=MAX_PIXELS)
        return show({"": image}, "", _caption(row))

    def clear(text: str = NO_IMAGE) -> list[Any]:
        return [None, "", gr.Radio(visible=False), text, gr.Button(visible=False)]

    hidden = dict(api_visibility="private")
    upload.upload(read, upload, [*outputs, upload], **hidden)
    choice.input(select, [choice, windows], outputs, **hidden)
    gallery.select(example, None, outputs, **hidden)
    remove.click(lambda: clear(), None, outputs, **hidden)


def _examples() -> list[dict]:
    """Return one image of each modality, which no model of the project was trained on."""
    rows = read_manifest(SAMPLE / "manifest.jsonl")
    by_modality = {row["modality"]: row for row in reversed(rows) if row["split"] == "test"}
    return sorted(by_modality.values(), key=_caption)


def _caption(row: dict) -> str:
    return " ".join(part for part in (row["body_part"], row["modality"]) if part)


def _with_image(windows: Windows | None, window: str, text: str) -> Turn:
    """Return the question about the current image, or alone; raise GenerateError if it is empty."""
    if not text.strip():
        raise GenerateError("the question is empty; write one")
    return (ShownImage(windows[window]), text) if windows else (text,)


def _needed(windows: Windows | None, window: str) -> PIL.Image.Image:
    if not windows:
        raise GenerateError("there is no image; upload one or select an example")
    return windows[window]


# ---- Chat ----


def _chat_tab(models: Models, windows: gr.State, window: gr.State) -> None:
    turns, running = gr.State(()), gr.State([])  # the list is changed, never replaced
    chat = gr.Chatbot(
        label="Conversation", height=460, render_markdown=False, feedback_options=None, buttons=[],
        elem_id="chat", placeholder="Ask about the image, or about anything.",
    )  # fmt: skip
    with gr.Row():
        question = gr.Textbox(
            show_label=False, placeholder="Is this a CT?", scale=5, max_length=MAX_TEXT,
            elem_id="question", label="Question", container=False, min_width=200,
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
        stop = gr.Button("Stop", scale=1, min_width=90)
        new = gr.Button("New chat", scale=1, min_width=120)
    with gr.Accordion("Settings", open=False):
        mode = gr.Radio(
            [("text", "text"), ("text and images", "mixed")], value="text", label="Answer"
        )
        settings = _text_settings()

    def answer(text, turns, running, windows, window, mode, *numbers):
        with explained():
            asked = _with_question(turns, _with_image(windows, window, text))
            request = _request(models, models.newest, asked, mode, numbers)
            yield asked, _messages((*asked, (WAITING,))), ""
            for (so_far,) in answers.answers(models.service, [request], running):
                yield (*asked, so_far), _messages((*asked, so_far)), gr.skip()

    def cancel(running: list[Ticket]) -> None:
        for ticket in [*running]:
            ticket.cancel()

    def reset(running: list[Ticket]) -> tuple[Any, ...]:
        cancel(running)
        end = time.monotonic() + STOP_S
        while running and time.monotonic() < end:  # the last part of the answer comes first
            time.sleep(0.05)
        return (), [], ""

    inputs = [question, turns, running, windows, window, mode, *settings]
    outputs, hidden = [turns, chat, question], dict(api_visibility="private")
    gr.on([send.click, question.submit], answer, inputs, outputs, show_progress="hidden", **hidden)
    stop.click(cancel, running, None, **hidden)
    new.click(reset, running, outputs, **hidden)


def _with_question(turns: Sequence[Turn], question: Turn) -> tuple[Turn, ...]:
    """Add a question, without an image that is in the conversation already.

    An earlier question that was stopped before its answer is left out.
    """
    turns = turns[: len(turns) // 2 * 2]
    known = {id(p.image) for turn in turns for p in turn if isinstance(p, ShownImage)}
    return (
        *turns,
        tuple(p for p in question if not isinstance(p, ShownImage) or id(p.image) not in known),
    )


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return the conversation as gradio shows it; user and model take turns."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": [_shown(part) for part in turn]}
        for number, turn in enumerate(turns)
    ]


def _shown(part: Part) -> Any:
    if not isinstance(part, ShownImage):  # gradio shows a text as HTML
        return html.escape(part if isinstance(part, str) else part.text, quote=False)
    return gr.HTML(part.figure)


# ---- The other tabs ----


def _draw_tab(models: Models) -> None:
    text = gr.Textbox(label="Description", value="An axial CT of the chest.", max_length=MAX_TEXT)
    with gr.Row():
        guidance = gr.Slider(1, 10, value=3, step=0.5, label="Guidance by the text")
        seed = _seed()
    draw = gr.Button("Generate an image", variant="primary", elem_id="draw")
    shown = gr.HTML(elem_id="drawn")

    def generate(text, guidance, seed):
        with explained():
            settings = answers.make_sample(
                temperature=0, max_tokens=MAX_TOKENS, seed=_checked_seed(seed), guidance=guidance
            )
            request = GenerationRequest(
                model=models.newest, prompt=answers.prompt(models.service, [(text,)]),
                sample=settings, mode="image",
            )  # fmt: skip
            yield markup.paragraph(WAITING.text)
            for (turn,) in answers.answers(models.service, [request]):
                drawn = [part.image for part in turn if isinstance(part, ShownImage)]
                caption = f"generated: {text} (guidance {guidance:g}, seed {seed:g})"
                if drawn:
                    yield markup.figures([(drawn[0], caption)], generated=True)
                elif turn:
                    yield markup.paragraph(answers.text_of(turn))

    draw.click(generate, [text, guidance, seed], shown, api_visibility="private")


def _compare_tab(models: Models, windows: gr.State, window: gr.State) -> None:
    gr.HTML(markup.paragraph("The same question and seed, without and with the adapter."))
    question = gr.Textbox(label="Question", max_length=MAX_TEXT)
    ask = gr.Button("Ask both", variant="primary")
    with gr.Row():
        before = gr.Textbox(label=f"Before: {models.base}", lines=4, interactive=False)
        after = gr.Textbox(label=f"After: {models.adapter}", lines=4, interactive=False)
    with gr.Accordion("Settings", open=False):
        settings = _text_settings()

    def compare(text, windows, window, *numbers):
        with explained():
            turn = _with_image(windows, window, text)
            requests = [
                _request(models, name, (turn,), "text", numbers)
                for name in (models.base, models.adapter)
            ]
            for sides in answers.answers(models.service, requests):
                yield [answers.text_of(side) for side in sides]

    inputs = [question, windows, window, *settings]
    ask.click(compare, inputs, [before, after], api_visibility="private")


def _reconstruct_tab(models: Models, windows: gr.State, window: gr.State) -> None:
    gr.HTML(markup.paragraph(
        "The image as the model reads it, and as its codes alone give it back: what the VQGAN "
        "loses, no answer can use."
    ))  # fmt: skip
    run = gr.Button("Encode and decode", variant="primary", elem_id="reconstruct")
    shown = gr.HTML()

    def reconstruct(windows, window):
        with explained():
            image = _needed(windows, window)
            (codes,) = models.service.encode([image]).result()
            (decoded,) = models.service.decode([codes]).result()
        size = decoded.width
        read = ((images.preprocess(image, size) + 1) / 2 * 255).round().astype(np.uint8)
        error = np.abs(read.astype(float) - np.asarray(decoded.convert("RGB"))).mean()
        return markup.figures([
            (PIL.Image.fromarray(read), f"as read, {size} x {size}"),
            (decoded, f"from {codes.size} codes; mean difference {error:.1f} of 255"),
        ])  # fmt: skip

    run.click(reconstruct, [windows, window], shown, api_visibility="private")


def _likelihoods_tab(models: Models, windows: gr.State, window: gr.State) -> None:
    question = gr.Textbox(label="Question", max_length=MAX_TEXT, elem_id="scored")
    options = gr.Textbox(
        label="Options, one per line", lines=4, value="yes\nno", max_length=MAX_TEXT
    )
    run = gr.Button("Score the options", variant="primary", elem_id="score")
    shown = gr.HTML()

    def score(text, options, windows, window):
        with explained():
            turn = _with_image(windows, window, text)
            texts = list(dict.fromkeys(line.strip() for line in options.splitlines()))
            texts = [line for line in texts if line]
            prompt = answers.prompt(models.service, [turn])
            scores = models.service.score(models.newest, prompt, texts).result()
            by_token = [_by_token(models.service, *row) for row in zip(texts, scores, strict=True)]
        shares = _softmax([score.total for score in scores])
        rows = [
            [text, tokens, score.total, score.mean, share]
            for text, tokens, score, share in zip(texts, by_token, scores, shares, strict=True)
        ]
        return markup.table(
            "Log-likelihood of each option as the complete answer, in natural logarithms",
            ["option", "by token", "total", "per token", "share"],
            sorted(rows, key=lambda row: -row[2]),
        )

    run.click(score, [question, options, windows, window], shown, api_visibility="private")


def _by_token(service: Service, option: str, score: api.Score) -> str:
    """Return each token of an option with its log-likelihood: "y -0.41, es -0.02"."""
    ((*ids,),) = api.encode_options(service.bundle, [option], "the question")
    names = [service.bundle.tokenizer.decode([token]) for token in ids]
    return ", ".join(f"{n} {value:.2f}" for n, value in zip(names, score.by_token, strict=True))


def _softmax(values: Sequence[float]) -> list[float]:
    exponentials = np.exp(np.array(values) - max(values))
    return [float(share) for share in exponentials / exponentials.sum()]


def _text_settings() -> list[gr.components.Component]:
    with gr.Row():
        temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0: greedy)")
        limit = gr.Slider(1, MAX_TOKENS, value=128, step=1, label="Tokens of text at most")
        return [temperature, limit, _seed()]


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)


def _checked_seed(seed: float | None) -> int:
    if seed is None:
        raise GenerateError(f"seed is empty; it must be an integer of 0 .. {MAX_SEED}")
    return int(seed)


def _request(
    models: Models, name: str, turns: Sequence[Turn], mode: str, numbers: Sequence[float]
) -> GenerationRequest:
    temperature, limit, seed = numbers
    return GenerationRequest(
        model=name,
        prompt=answers.prompt(models.service, turns),
        sample=answers.make_sample(
            temperature=temperature, max_tokens=limit, seed=_checked_seed(seed)
        ),
        mode=mode,
    )
