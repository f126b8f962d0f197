# Copyright 2026 The trl_spo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Necessity: what a person sees and presses is not what a function returns. A real browser (headless Chromium) labels pairs on the
page of a real `trl-spo label`, which is killed, put on a full disk and asked for other files in between; the dataset that comes
out must hold what was clicked.
"""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from trl_spo.label_folder import CLICKS, read_clicks
from trl_spo.preference_dataset import load_preference_dataset
from trl_spo.scripts.label_pairs import open_folder, save_pair


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HTML = "<img src=x onerror=\"document.title='attacked'\"><b>bold</b> {{value}} ${1+1}"
RED, BLUE = (200, 30, 30), (30, 30, 200)
NUM_PAIRS = 12


@pytest.fixture
def browser():
    """Chromium, as the system's package manager installs it: Playwright brings none along."""
    if CHROMIUM is None:
        if os.environ.get("TRL_SPO_NEEDS_BROWSER"):
            pytest.fail("There is no Chromium, and this run must have one: `apt-get install chromium`.")
        pytest.skip("There is no Chromium for the test in a browser: `apt-get install chromium`.")
    if find_spec("gradio") is None:
        pytest.skip("The page needs gradio: `pip install trl-spo[label]`.")
    api = pytest.importorskip("playwright.sync_api", reason="The test in a browser needs playwright.")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Server:
    """`trl-spo label` on a folder, in a process of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "trl_spo.scripts.cli", "label", "--output_dir", str(self.folder)]
        command += ["--port", str(self.port), "--no_open_browser", "--annotator", "anna", "--repeat_fraction", "0"]
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("Label at http://127.0.0.1:"):
                self.port = int(line.split("127.0.0.1:")[1].split()[0])
                return
        pytest.fail("The server did not start.")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(timeout=60)


@pytest.fixture
def server(tmp_path, browser):
    """Twelve pairs, the first image red and the second one blue, so that a test sees which is where."""
    folder = tmp_path / "labels"
    open_folder(folder, {"seed": 0})
    for index in range(NUM_PAIRS):
        prompt = HTML if index == 1 else f"prompt {index}"
        save_pair(folder, index, prompt, [Image.new("RGB", (256, 192), colour) for colour in (RED, BLUE)])
    (folder / "secret.txt").write_text("secret", encoding="utf-8")
    server = Server(folder)
    yield server
    server.stop()


class Tab:
    """A tab of the browser with the page of an annotator."""

    def __init__(self, browser, server: Server, annotator: str | None = None):
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": 1300, "height": 850})
        self.page.set_default_timeout(60_000)  # a busy machine is slow, not broken
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(server.address + (f"/?annotator={annotator}" if annotator else ""))
        self.wait()

    def wait(self, state: str = "pair") -> None:
        self.page.wait_for_selector(f'.spo[data-state="{state}"]', timeout=60_000)

    def text(self, name: str) -> str:
        return self.page.inner_text(f"#{name}")

    def index(self) -> int:
        """Number of the pair that is shown."""
        return int(self.page.get_attribute("#left", "src").split("/")[-2])

    def red_side(self) -> str:
        """Where the first image is, read from the pixels on the screen."""
        box = self.page.locator("#left").bounding_box()
        middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "width": 1, "height": 1}
        pixel = Image.open(io.BytesIO(self.page.screenshot(clip=middle)))
        red, _, blue = pixel.convert("RGB").getpixel((0, 0))
        return "left" if red > blue else "right"

    def press(self, key: str, count: str | None = None) -> None:
        self.page.keyboard.press(key)
        if count is not None:
            self.until(count)

    def until(self, count: str) -> None:
        self.page.wait_for_function("count => document.querySelector('#count').textContent === count", arg=count)
        self.page.wait_for_selector('.spo:not([data-state="busy"])')


def saved(server: Server) -> list[tuple]:
    return [(click.annotator, int(click.pair), click.choice) for click in read_clicks(server.folder)]


def test_an_hour_of_labelling(browser, server):
    """The steps follow each other on one server and one folder, as they do in life."""
    keys_and_mouse(browser, server)
    two_clicks_at_once_and_two_tabs(browser, server)
    a_full_disk_is_said_and_loses_nothing(browser, server)
    no_other_file_is_served(server)
    a_killed_server_loses_nothing(browser, server)
    the_end_says_what_there_is(server)


def keys_and_mouse(browser, server):
    """Every way to decide, and undo; the labels are those of the images, whatever side they were on."""
    tab = Tab(browser, server)
    assert tab.text("prompt") == "prompt 0" and tab.text("count") == "0 of 12"
    assert tab.page.input_value("#annotator") == "anna"

    # Pair 0 with an arrow: the red image. Pair 1 has HTML for a prompt, and gets the blue image with a number.
    tab.press("ArrowLeft" if tab.red_side() == "left" else "ArrowRight", "1 of 12")
    assert tab.text("prompt") == HTML
    assert tab.page.locator("#prompt *").count() == 0 and tab.page.title() != "attacked"
    tab.press("2" if tab.red_side() == "left" else "1", "2 of 12")

    # Pair 2 by a click on the red image, pair 3 by a button: a tie; pair 4 skipped, taken back, and skipped again.
    tab.page.click(f"#{tab.red_side()}")
    tab.until("3 of 12")
    tab.page.click('nav [data-choice="tie"]')
    tab.until("4 of 12")
    tab.press("s", "5 of 12")
    tab.press("Backspace", "4 of 12")
    assert tab.index() == 4
    tab.press("s", "5 of 12")
    choices = [choice for _, _, choice in saved(server)]
    assert len(choices) == 7 and choices[3:] == ["tie", "skip", "undo", "skip"]

    # Nothing came from anywhere else, and a letter in the name field is no choice.
    assert all(address.startswith((server.address, "data:")) for address in tab.requests)
    tab.page.fill("#annotator", "susu")
    tab.page.keyboard.press("Escape")
    assert len(saved(server)) == 7
    tab.page.close()
    labels = [row["label_0"] for row in load_preference_dataset(server.folder)]
    assert labels == [1.0, 0.0, 1.0, 0.5]


def two_clicks_at_once_and_two_tabs(browser, server):
    """A double click decides one pair. Two tabs of one annotator do not overwrite each other; two annotators do not mix."""
    first, second, other = Tab(browser, server), Tab(browser, server), Tab(browser, server, "ben")
    assert first.index() == second.index() == 5 and other.index() == 0
    first.page.dblclick('nav [data-choice="left"]')
    first.until("6 of 12")
    before = len(saved(server))
    second.press("ArrowRight", "6 of 12")  # the same pair, which the first tab has decided
    assert "already had its answer" in second.text("message") and len(saved(server)) == before
    assert [click for click in saved(server) if click[1] == 5] == [("anna", 5, "left")]
    other.press("ArrowDown", "1 of 12")
    first.page.keyboard.down("ArrowDown")  # held: the browser repeats the key
    first.page.keyboard.down("ArrowDown")
    first.page.keyboard.up("ArrowDown")
    first.until("7 of 12")
    assert saved(server)[before:] == [("ben", 0, "tie"), ("anna", 6, "tie")]
    for tab in (first, second, other):
        tab.page.close()


def a_full_disk_is_said_and_loses_nothing(browser, server):
    """The kernel lets the running server write no more, and then again."""
    tab = Tab(browser, server)
    size = (server.folder / CLICKS).stat().st_size
    before = saved(server)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    tab.press("ArrowLeft")
    tab.page.wait_for_selector(".message.failed:not(:empty)")
    assert "was not saved: File too large" in tab.text("message")
    assert tab.index() == 7 and tab.text("count") == "7 of 12" and saved(server) == before
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    tab.press("ArrowLeft", "8 of 12")
    assert saved(server) == [*before, ("anna", 7, "left")] and tab.text("message") == ""
    tab.page.close()


def a_killed_server_loses_nothing(browser, server):
    """The page says that a click is not saved, and goes on by itself with the server that is started again."""
    tab = Tab(browser, server)
    tab.press("ArrowDown", "9 of 12")
    before = saved(server)
    server.kill()
    tab.press("ArrowLeft")
    tab.page.wait_for_selector(".message.failed:not(:empty)")
    assert "this was not saved" in tab.text("message") and tab.index() == 9
    with open(server.folder / CLICKS, "ab") as file:  # what a program leaves that dies while it writes
        file.write(b'{"annotator": "an')
    server.start()
    tab.press("ArrowDown", "10 of 12")
    assert saved(server) == [*before, ("anna", 9, "tie")]
    tab.press("ArrowDown", "11 of 12")
    tab.press("ArrowDown", "12 of 12")
    tab.wait("done")
    assert tab.text("prompt") == "That was the last pair."
    tab.press("u", "11 of 12")
    assert tab.index() == 11
    tab.page.close()
    rows = {row["caption"]: row["label_0"] for row in load_preference_dataset(server.folder)}
    assert len(rows) == 10  # twelve, without the one that anna skipped and the one that was taken back
    assert rows["prompt 0"] == 0.75 and rows[HTML] == 0.0  # anna 1, ben a tie


def status(address: str, **headers) -> int:
    try:
        return urlopen(Request(address, headers=headers), timeout=5).status
    except HTTPError as error:
        return error.code


def no_other_file_is_served(server):
    """Neither by the page, nor by the routes that Gradio has for files; and not to pages of other sites."""
    assert status(f"{server.address}/pair/00000/0") == 200
    paths = ["/gradio_api/file=/etc/passwd", "/file=/etc/passwd", f"/gradio_api/file={server.folder}/secret.txt"]
    paths += [f"/gradio_api/file={server.folder}/images/00000_0.png", "/gradio_api/file=../secret.txt"]
    paths += ["/pair/../secret.txt", "/pair/..%2fsecret.txt/0", "/pair/00000/2", "/pair/secret.txt/0", "/secret.txt"]
    paths += ["/static/..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd"]
    paths += ["/gradio_api/info", "/gradio_api/proxy=http://127.0.0.1/", "/docs", "/clicks.jsonl"]
    assert {path: status(server.address + path) for path in paths} == dict.fromkeys(paths, 404)
    assert status(f"{server.address}/gradio_api/upload", Origin="https://example.com") == 404
    assert status(f"{server.address}/pair/00000/0", Host="example.com") == 400
    assert status(f"{server.address}/gradio_api/component_server", Origin="https://example.com") == 403


def the_end_says_what_there_is(server):
    server.process.send_signal(signal.SIGINT)
    output = server.process.communicate(timeout=60)[0]
    assert server.process.returncode == 0
    assert "12 decisions on 10 labelled pairs" in output and "trl-spo step-reward --dataset_name" in output
    assert json.loads((server.folder / "label.json").read_text(encoding="utf-8")) == {"seed": 0}
