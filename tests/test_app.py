"""The page in a real browser, and around it: progress, errors, the queue, what is left behind."""
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future

import av
import numpy as np
import pytest

import data
import sample
from conftest import ROOT, write_video

pytest.importorskip("gradio", reason="the page needs demo/requirements.txt (gradio missing)")
DRIVING = ROOT / "demo" / "driving.mp4"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def listens(host, port):
    with socket.socket() as s:
        return s.connect_ex((host, port)) == 0


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as f:
        return sum(map(int, f.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder of its temporary files, seconds until it answered) of `python demo/app.py`."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    environment = dict(os.environ, TMPDIR=str(folder), OMP_NUM_THREADS="1")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, ROOT / "demo" / "app.py", "--port", str(port)], cwd=folder, env=environment,
                                   stdout=log, stderr=log)
    began = time.monotonic()
    while not listens("127.0.0.1", port):
        assert process.poll() is None and time.monotonic() - began < 120, (folder / "log").read_text()
        time.sleep(0.05)
    seconds = min(time.monotonic() - began, cpu_seconds(process.pid))      # on a busy machine it waits for others
    yield f"http://127.0.0.1:{port}", folder, seconds
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, 128 + signal.SIGTERM)                        # the latter while it still loads models
    assert not list(folder.glob("reenact-*"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser test: pip install playwright")
    with playwright.sync_playwright() as p:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no browser test: Chromium is not installed (apt-get install chromium)")
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """A function that opens the page, in a window of its own, with one step."""
    windows = []

    def open_page(steps=1):
        window = browser.new_context(viewport=dict(width=1200, height=900))
        windows.append(window)
        page = window.new_page()
        page.set_default_timeout(60_000)
        page.hosts = set()
        page.on("request", lambda r: page.hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
        page.goto(server[0])
        field = page.get_by_label("number input for Steps")
        field.fill(str(steps))
        field.press("Tab")
        return page
    yield open_page
    for window in windows:
        window.close()


def upload(page, source, driving):
    for place, path in (("#source", source), ("#driving", driving)):
        with page.expect_response(re.compile("/upload")):
            page.locator(f"{place} input[type=file]").set_input_files(path)
    page.wait_for_timeout(500)


def start(page):
    page.get_by_role("button", name="Reenact").click()


def finish(page):
    page.locator("video[src*='reenacted.mp4']").first.wait_for()


def test_it_answers_soon_and_here_only(server):
    address, _, seconds = server
    assert seconds < 10
    assert not listens("127.0.0.2", int(address.rpartition(":")[2]))        # as anyone could with 0.0.0.0


def test_a_video_from_the_page(open_page, server, tmp_path):
    frames = np.stack(list(data.Video(DRIVING)))[:24]
    driving = write_video(tmp_path / "driving.mp4", frames, 24, sound="aac")
    page = open_page()
    upload(page, sample.SOURCE, driving)
    page.get_by_label("Comparison").check()
    start(page)
    state = page.locator("#state")
    for part in ("landmarks 24 of 24", "denoising 1 of 1", "rows 8 of 8"):
        state.locator("label", has_text=part).wait_for()
        assert page.locator("video[src*='reenacted.mp4']").count() == 0 or part.startswith("rows")
    assert 1 <= state.locator("img").count() <= 24
    finish(page)
    state.locator("label", has_text="writing 24 of 24").wait_for()
    assert state.locator("img").count() == 24
    page.locator("video[src*='reenacted-compare.mp4']").wait_for()

    with page.expect_download() as download:
        page.get_by_role("button", name="Download the result").click()
    download.value.save_as(tmp_path / "result.mp4")
    result = data.Video(tmp_path / "result.mp4")
    assert len(list(result)) == 24 and result.fps == 24
    with av.open(str(tmp_path / "result.mp4")) as f:
        about = f.metadata["comment"]
        assert len(f.streams.audio) == 1
    assert about.startswith("synthetic") and json.loads(about.partition("; ")[2])["steps"] == 1
    assert page.hosts == {server[0].removeprefix("http://")}               # no one else hears of it
    assert "The result is synthetic" in page.inner_text("body")


def test_a_text_file_is_one_sentence(open_page, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    page = open_page()
    upload(page, sample.SOURCE, tmp_path / "text.mp4")
    start(page)
    sentence = page.locator(".toast-body", has_text="is not a video").inner_text()
    assert re.search(r"(?m)^text\.mp4 is not a video", sentence) and "Traceback" not in sentence


def test_two_jobs_queue_and_examples_run(open_page):
    first, second = open_page(steps=8), open_page()
    for page in (first, second):
        page.get_by_text("a woman with red hair", exact=True).click()
        if page is first:
            page.locator("#state label").first.wait_for()
    second.get_by_text(re.compile(r"queue: \d/\d")).first.wait_for()
    assert second.locator("#state label").count() == 0
    finish(first)
    finish(second)


def test_closing_the_page_ends_its_job_and_removes_its_files(open_page, server, tmp_path):
    """A long job, which another page would wait for."""
    [cache] = server[1].glob("reenact-*")
    frames = np.stack(list(data.Video(DRIVING)))
    driving = write_video(tmp_path / "mine.mp4", np.concatenate([frames] * 4))
    page = open_page(steps=250)
    upload(page, sample.SOURCE, driving)
    assert list(cache.rglob("mine.mp4"))
    for leave in (page.get_by_role("button", name="Stop").click, page.context.close):
        start(page)
        page.locator("#state label", has_text="denoising").wait_for()
        leave()

    def left():
        files = [name for _, _, names in os.walk(cache) for name in names]      # while folders go
        return sorted(files + [path.name for path in server[1].glob("tmp*")])
    deadline = time.monotonic() + 20
    while left() != ["driving.mp4", "source.png"] and time.monotonic() < deadline:  # those of the examples
        time.sleep(0.2)
    assert left() == ["driving.mp4", "source.png"]


def test_memory_after_ten_jobs_as_after_two(monkeypatch, tmp_path):
    """Through server and client, with a stand-in for the work."""
    import gradio_client

    import app

    def stand_in(source, driving, out, models, show, **options):
        assert options["steps"] == 3 and options["face"] == [0, 0] and options["prompt"] == "a man"
        for n in range(24):                                                     # of eight jobs 38 MB
            show("frame", n, 24, np.random.default_rng(n).integers(0, 255, (256, 256, 3), np.uint8))
        shutil.copy(DRIVING, out)

    def memory():
        gc.collect()
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(sample, "reenact", stand_in)
    models = Future()
    models.set_result(None)
    page = app.build_page(models, True)
    _, address, _ = page.launch(server_name="127.0.0.1", server_port=free_port(), quiet=True, ssr_mode=False, prevent_thread_lock=True)
    try:
        client = gradio_client.Client(address, verbose=False, download_files=False)
        given = [None, "a man", gradio_client.handle_file(str(DRIVING)), "", 3, 2, 0, 0, 0, False]
        for done in range(1, 11):
            assert client.predict(*given, api_name="/reenact")[1]
            if done == 2:
                after_two = memory()
        assert memory() < after_two + 25
    finally:
        page.close()
