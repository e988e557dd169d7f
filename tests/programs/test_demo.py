"""`medmax demo` in a browser: upload, ask, images out, refused files, and nothing left on disk.

The program runs in a process of its own with the shipped model; Chromium is the machine's.
"""

import contextlib
import gc
import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import PIL.Image
import pytest
from chromium import CHROMIUM
from source_setup import IMAGE_FILES, dicom_dataset
from test_demo_uploads import png_header
from test_package import SETTINGS

from medmax_jax import generation
from medmax_jax.demo import answers
from medmax_jax.generation.output_files import NOTICE
from medmax_jax.serving import Failed, TextDelta, Ticket

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "medmax_jax", "demo", "--model=medmax_jax/tiny"]
ADAPTER = "--adapter=medmax_jax/tiny_adapter"
AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
WAIT_MS = 180_000  # the first answer of each kind compiles
TABS = ("Chat", "Image from text", "Before and after", "Reconstruction", "Likelihoods")
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed"
)
in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    needs_gradio,
]


def browser_test(function):
    for mark in in_browser:
        function = mark(function)
    return function


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Demo:
    """The program, its address, and the folder of all temporary files of its process."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [*COMMAND, ADAPTER, f"--port={self.port}"], cwd=ROOT, text=True,
            env=os.environ | {"TMPDIR": str(folder)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        for line in self.process.stdout:
            if self.address in line:
                assert NOTICE in line
                return
        raise AssertionError(f"the program ended with status {self.process.wait()}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.output = self.process.communicate(timeout=120)[0]
        return self.process.returncode

    def stored_images(self) -> list[bytes]:
        """What the temporary files contain that is an image, but not one of the sample."""
        sample = {path.read_bytes() for path in IMAGE_FILES}
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        contents = {path.read_bytes() for path in files} - sample
        starts = (b"\x89PNG", b"\xff\xd8", b"RIFF", bytes(128) + b"DICM")
        return [content for content in contents if content.startswith(starts)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    program = Demo(tmp_path_factory.mktemp("temporary"))
    yield program
    if program.process.poll() is None:
        program.stop()


@pytest.fixture
def page(demo, browser):
    """The open page; at the end, each of its requests went to the program."""
    context = browser.new_context(viewport=dict(width=1280, height=900))
    opened, requests, problems = context.new_page(), [], []
    opened.set_default_timeout(WAIT_MS)
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(demo.address)
    opened.wait_for_selector("#chat")
    yield opened
    context.close()
    own = (demo.address, "data:", f"blob:{demo.address}")
    assert len(requests) > 10 and not [url for url in requests if not url.startswith(own)]
    assert not problems


def upload(page, content: bytes, name: str = "scan.png") -> None:
    file = dict(name=name, mimeType="application/octet-stream", buffer=content)
    page.set_input_files("#upload input[type=file]", [file])


def own_png() -> bytes:
    """A CT in a file that the sample does not have."""
    ct = next(path for path in IMAGE_FILES if path.name.startswith("ct-lung-2"))
    PIL.Image.open(ct).resize((96, 96)).save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


def ask(page, text: str) -> str:
    """Ask in the chat; return the answer when it is complete."""
    before = page.locator("#chat .bot").count()
    page.fill("#question textarea, #question input", text)
    page.click("#send")
    page.wait_for_function(
        "before => { const found = document.querySelectorAll('#chat .bot');"
        " const text = found.length > before && found[found.length - 1].innerText.trim();"
        " return text && !text.includes('Generating')"
        " && !document.querySelector('#chat [aria-label=\"Loading response\"]'); }",
        arg=before,
    )
    return page.locator("#chat .bot").last.inner_text()


@browser_test
def test_upload_ask_twice_and_no_pixel_is_stored(demo, page):
    upload(page, own_png())
    page.wait_for_selector("text=your image, 96 x 96")
    answer = ask(page, "Is this a CT?")
    g = generation.load("medmax_jax/tiny", adapter="medmax_jax/tiny_adapter")
    sample = answers.make_sample(temperature=0, max_tokens=128, seed=0)
    asked = [PIL.Image.open(io.BytesIO(own_png())), "Is this a CT?"]
    [[expected]] = generation.generate(g, [asked], sample, mode="text", seed=0)
    assert answer.strip() == expected.text.strip() != ""
    assert ask(page, "Is it <b>a</b> <img src='http://192.0.2.1/a.png'>?")
    questions = page.locator("#chat .user").all_inner_texts()
    assert any("<b>a</b> <img" in text for text in questions)  # a text, not markup
    assert page.locator("#chat img").count() == 1  # the second question refers to the first's
    assert not demo.stored_images()
    page.close()
    assert not demo.stored_images()


@browser_test
def test_image_from_text_reconstruction_and_likelihoods(page):
    page.get_by_role("tab", name="Image from text").click()
    page.click("#draw")
    source = page.wait_for_selector("#drawn img").get_attribute("src")
    assert source.startswith("data:image/png;base64,")
    page.click("#draw")
    page.wait_for_selector("#drawn >> text=Generating")
    assert page.wait_for_selector("#drawn img").get_attribute("src") == source  # the same seed
    page.get_by_role("tab", name="Reconstruction").click()
    page.click("#reconstruct")
    page.wait_for_selector("text=there is no image; upload one or select an example")
    page.locator("#examples button img").first.click()
    page.wait_for_selector("text=Remove the image")
    page.click("#reconstruct")
    page.wait_for_selector("text=from 64 codes; mean difference")
    page.get_by_role("tab", name="Likelihoods").click()
    page.fill("#scored textarea, #scored input", "Is this a CT?")
    page.click("#score")
    rows = page.locator("table").filter(has_text="per token").locator("tbody tr")
    rows.first.wait_for()
    assert sorted(rows.nth(n).locator("td").first.inner_text() for n in range(2)) == ["no", "yes"]
    tokens = [rows.nth(n).locator("td").nth(1).inner_text() for n in range(2)]
    assert all(re.fullmatch(r"(\S+ -\d+\.\d\d(, )?)+", text) for text in tokens), tokens
    shares = [float(rows.nth(n).locator("td").last.inner_text()) for n in range(2)]
    assert sum(shares) == pytest.approx(1, abs=2e-3) and shares[0] >= shares[1]


@browser_test
def test_a_ct_in_dicom_is_shown_in_windows(demo, page):
    values = np.linspace(0, 2_000, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    tags = dict(Modality="CT", RescaleSlope=1, RescaleIntercept=-1000, PatientName="Doe^Jane")
    dicom_dataset(values, **tags).save_as(file := io.BytesIO(), enforce_file_format=True)
    upload(page, file.getvalue(), "IM0001")
    shown = page.locator("img[alt^='your image, 64 x 64']")
    shown.wait_for()
    before = shown.get_attribute("src")
    page.get_by_label("lung").click()
    page.wait_for_function(
        "before => document.querySelector(\"img[alt^='your image, 64 x 64']\").src !== before",
        arg=before,
    )
    assert "Doe" not in page.content() and not demo.stored_images()


@browser_test
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_header(40_000, 40_000), "40000 x 40000 pixels; the limit is 64000000"),
        (b"%PDF-1.7", "not an image in a supported format"),
    ],
)
def test_files_that_are_refused_are_explained_and_deleted(demo, page, content, message):
    upload(page, content, "Jane Doe.png")
    page.wait_for_selector(f"text={message}")
    upload(page, own_png())  # the next file is accepted
    page.wait_for_selector("text=your image, 96 x 96")
    assert not demo.stored_images() and not list(demo.folder.rglob("Jane*"))


@browser_test
@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_every_tab_has_the_notice_is_accessible_and_fits(demo, browser, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(  # axe is a script, which the policy of the page forbids
        viewport=dict(width=width, height=900), color_scheme=scheme, bypass_csp=True
    )
    opened = context.new_page()
    opened.goto(demo.address)
    opened.wait_for_selector("#chat", timeout=WAIT_MS)
    for name in TABS:
        tab = opened.get_by_role("tab", name=name)
        if not tab.is_visible():  # a phone has a menu of the others
            opened.locator(".overflow-menu > button").click()
            tab = opened.locator(".overflow-dropdown").get_by_text(name)
        tab.click()
        assert opened.get_by_role("note").inner_text().startswith(NOTICE)
        assert opened.get_by_role("note").is_visible()
        assert opened.evaluate("document.documentElement.scrollWidth") == width
        opened.wait_for_timeout(500)  # colors change gradually
        found = axe.run(opened, options=AXE).response
        assert len(found["passes"]) > 10
        assert not [(r["id"], n["html"]) for r in found["violations"] for n in r["nodes"]], name
    context.close()


@contextlib.contextmanager
def served_here(service, folder):
    """The page in this process, whose memory can be inspected, and its address."""
    from medmax_jax.demo import page as demo_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        models = demo_page.Models(service=service, base="tiny", adapter="", facts={})
        blocks, port = demo_page.build(models), free_port()
        demo_page.launch(blocks, port)
        try:
            yield blocks, f"http://127.0.0.1:{port}"
        finally:
            blocks.close()
            with warnings.catch_warnings():  # gradio leaves event loops and their sockets open
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()


@browser_test
def test_the_memory_of_a_closed_page_is_released(browser, tmp_path):
    with served_here(None, tmp_path) as (blocks, address):
        opened = browser.new_page()
        opened.goto(address)
        upload(opened, own_png())
        opened.wait_for_selector("text=your image, 96 x 96")
        sessions = blocks.state_holder.session_data
        kept = [value for state in sessions.values() for value in state.state_data.values()]
        assert any(isinstance(value, dict) and "" in value for value in kept)
        opened.close()
        end = time.monotonic() + 60
        while sessions and time.monotonic() < end:
            time.sleep(0.2)
        assert not sessions


class WaitingService:
    """Answers when the test delivers an event; a cancelled request fails as in the service."""

    def __init__(self):
        self.tickets, self.turns = [], []

    def prompt(self, turns):
        self.turns.append(turns)
        return np.arange(3)

    def submit(self, request, deliver):
        failed = Failed("cancelled", "the client cancelled the request")
        self.tickets.append(Ticket(0, request, deliver, lambda ticket: ticket.deliver(failed)))
        deliver(TextDelta("A "))
        return self.tickets[-1]


@browser_test
def test_an_answer_is_streamed_and_stopped_and_the_next_one_starts(browser, tmp_path):
    service = WaitingService()
    with served_here(service, tmp_path) as (_, address):
        opened = browser.new_page()
        opened.set_default_timeout(WAIT_MS)
        opened.goto(address)
        for number in range(2):  # a stopped answer does not block the next question
            opened.fill("#question textarea, #question input", "What is it?")
            opened.click("#send")
            last = opened.locator("#chat .bot").nth(number)
            last.get_by_text("A", exact=True).wait_for()
            service.tickets[number].deliver(TextDelta("CT"))
            last.get_by_text("A CT", exact=True).wait_for()
            if not number:
                opened.get_by_role("button", name="Stop").click()
                last.get_by_text("(stopped)").wait_for()
        assert service.turns[1] == [["What is it?"], ["A CT"], ["What is it?"]]
        opened.get_by_role("button", name="New chat").click()
        opened.get_by_text("Ask about the image").wait_for()
        assert not opened.locator("#chat .bot").count()
        opened.close()


@browser_test
def test_a_signal_ends_it_and_removes_its_files(tmp_path):
    program = Demo(tmp_path)
    assert len(list(tmp_path.glob("medmax-demo-*"))) == 1
    assert program.stop() == 0, program.output
    assert not list(tmp_path.iterdir()) and "Traceback" not in program.output


def test_without_gradio_the_message_has_the_command():
    code = (
        "import runpy, sys\nsys.modules['gradio'] = None\n"
        f"sys.argv = {['medmax', *COMMAND[3:]]}\n"
        "runpy.run_module('medmax_jax', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    (requirement,) = SETTINGS["project"]["optional-dependencies"]["demo"]
    expected = f'error: the page requires gradio: pip install "{requirement}"\n'
    assert (done.returncode, done.stderr) == (1, expected)


@needs_gradio
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter=medmax_jax/no"], "medmax_jax/no/adapter_config.json: no such file"),
        (
            ["--port=USED"],
            "127.0.0.1, port USED, cannot be used (Address already in use); use another --port",
        ),
    ],
)
def test_wrong_flags_are_explained_in_one_line(words, message, tmp_path):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = str(used.getsockname()[1])
        words, message = [w.replace("USED", port) for w in words], message.replace("USED", port)
        done = subprocess.run(
            [*COMMAND, "--compile_cache=off", *words], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )  # fmt: skip
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")


# In a process of its own: gradio leaves event loops open.
PAGE = """
import json, gradio as gr
from medmax_jax.demo import page

settings = {}
gr.Blocks.launch = lambda self, **given: settings.update(given)
models = page.Models(service=None, base="tiny", adapter="mine", facts={"model": "<tiny>"})
blocks = page.build(models)
page.launch(blocks, 7860)
print(json.dumps([settings, blocks.get_config_file()], default=str))
"""


@needs_gradio
def test_the_page_records_nothing_and_has_no_interface_for_programs():
    done = subprocess.run([sys.executable, "-c", PAGE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout.splitlines()[-1]
    settings, config = json.loads(text)
    assert settings["share"] is settings["run_history"] is settings["enable_monitoring"] is False
    assert settings["server_name"] == "127.0.0.1"
    assert config["analytics_enabled"] is False
    assert {d["api_visibility"] for d in config["dependencies"]} == {"private"}
    assert [d["targets"][0][1] for d in config["dependencies"]].count("unload") == 1
    assert NOTICE in text and "&lt;tiny&gt;" in text and "googleapis" not in text
