"""The page in a real Chromium: it loads, draws, scrubs, explains a bad value, and asks no other host for anything."""

import base64
import importlib.util
import io
import re
import shutil
import socket
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from harness.tiny_pipelines import build, drawn
from PIL import Image

from sfd_fast.app.page import launch
from sfd_fast.app.studio import Studio
from sfd_fast.sampling.pipeline import SFDPipeline

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LOOPBACK = ("127.", "::1", "localhost")
WAIT_MS = 120_000

absent = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
absent += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.skipif(bool(absent), reason=f"not installed here: {', '.join(absent)}"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "model"
    build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def served(folder):
    """The page's address, and every address that this process connects to while it serves."""
    connected = []
    connect = socket.socket.connect

    def recorded(self, address):
        connected.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded)
        page, address = launch(
            Studio(str(folder), twin=str(folder), batch=4, device="cpu"), host="127.0.0.1", port=0, block=False
        )
        yield address, connected
        page.close()


@pytest.fixture(scope="module")
def tab(served):
    """The page in Chromium, with what it asked for and complained of as tab.requested and tab.complaints."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(WAIT_MS)
        tab.requested, tab.complaints = [], []
        tab.on("request", lambda request: tab.requested.append(request.url))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on("console", lambda line: tab.complaints.append(line.text) if line.type == "error" else None)
        tab.goto(served[0])
        tab.wait_for_selector("#draw")
        yield tab
        browser.close()


def fill(tab, field, value):
    box = tab.locator(f"#{field} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def draw(tab, *, seed, steps=4):
    """Presses Draw with these values and waits for the answer; every call takes a seed of its own."""
    fill(tab, "seed", seed)
    fill(tab, "steps", steps)
    tab.click("#draw")
    tab.locator("#status").get_by_text(f"seed {seed} in" if steps else "cannot be drawn").wait_for()


def pictures(tab, name):
    """The pictures of that name on the page, (N, H, W, 3) uint8."""
    sources = tab.eval_on_selector_all(f"#moment img[alt={name}]", "images => images.map(image => image.src)")
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(s.split(",")[1])))) for s in sources])


def test_a_click_gives_the_pictures_of_the_pipeline(tab, folder):
    draw(tab, seed=7)
    assert re.match(r"4 images of each model with seed 7 in [\d.]+ s", tab.inner_text("#status"))
    pipeline = SFDPipeline.from_pretrained(folder, micro_batch_size=4, device="cpu")
    images = drawn(pipeline, [0, 0, 0, 0], seed=7, num_inference_steps=4)
    assert np.array_equal(pictures(tab, "texture"), np.concatenate([images, images]))  # the model, and its twin


def test_the_scrubber_goes_through_the_stages(tab):
    draw(tab, seed=8)
    seen = {}
    for tau, stage in ((0, "noise"), (0.3, "I: semantics"), (1, "II: both"), (1.3, "III: texture")):
        fill(tab, "tau", tau)
        tab.wait_for_function(
            "stage => document.querySelector('#moment .clocks b').innerText === stage", arg=stage, timeout=WAIT_MS
        )
        seen[tau] = pictures(tab, "semantics"), pictures(tab, "texture")
    still = {(0, 0.3): 1, (1, 1.3): 0}  # stage I leaves the texture alone, stage III the semantics
    for (before, after), part in still.items():
        assert np.array_equal(seen[before][part], seen[after][part])
        assert not np.array_equal(seen[before][1 - part], seen[after][1 - part])
    stages = tab.locator("#moment .stages").first.locator("span")
    assert stages.all_inner_texts() == ["I semantics", "II both", "III texture"]
    boxes = [tab.locator(f"#moment img[alt={part}]").first.bounding_box() for part in ("semantics", "texture")]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]


def test_a_bad_value_gives_a_message_and_leaves_the_pictures(tab):
    draw(tab, seed=9)
    before = pictures(tab, "texture")
    draw(tab, seed=10, steps=0)
    assert tab.inner_text("#status").strip() == "This cannot be drawn: the number of steps is 0: give 1 to 1000."
    assert np.array_equal(pictures(tab, "texture"), before)


def test_the_code_to_copy_is_that_of_the_last_draw(tab):
    draw(tab, seed=11)
    tab.click("#copy button")
    tab.wait_for_selector("#command .cm-content")
    assert "--seed 11" in tab.inner_text("#command")
    assert "seed=11" in tab.inner_text("#python")


def test_own_scales_bring_a_slider_for_each_part(tab):
    assert not tab.get_by_label("number input for semantic scale").is_visible()
    tab.click("#apart input")
    tab.get_by_label("number input for semantic scale").wait_for(state="visible")
    tab.click("#apart input")
    tab.get_by_label("number input for guidance scale").wait_for(state="visible")


def test_no_other_host_is_asked_for_anything(tab, served):
    draw(tab, seed=12)
    address, connected = served
    hosts = {urlsplit(url).hostname for url in tab.requested if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(address).hostname}
    assert tab.complaints == []
    outside = [a for a in connected if isinstance(a, tuple) and not str(a[0]).startswith(LOOPBACK)]
    assert outside == []


def test_the_served_page_loads_nothing_from_outside_and_forbids_it(served):
    with urlopen(served[0]) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page) == []
    assert re.findall(r"url\([\"']?(?:https?:)?//|@import", page) == []
    assert policy == "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def test_a_port_in_use_is_named(served, folder):
    port = urlsplit(served[0]).port
    with pytest.raises(OSError, match=str(port)):
        launch(Studio(str(folder), batch=4, device="cpu"), host="127.0.0.1", port=port, block=False)
