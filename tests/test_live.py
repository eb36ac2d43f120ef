"""The live page: by HTTP it draws what sample.py draws, to the bit, and takes no nonsense; in Chromium it does what it
promises to eyes and hands. `python tests/test_live.py` remakes docs/live.png.
"""

import base64
import http.client
import io
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, run_sample  # puts the project's root where `live` is found

import hipa  # isort: skip
import sample  # isort: skip
from live import __main__ as live  # isort: skip
from vae import to_pil  # isort: skip


@contextmanager
def serving(model):
    server = live.Server(0, live.Painter(model, device="cpu"))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.painter.thread.shutdown()


@pytest.fixture(scope="module")
def server():
    with serving("emoji") as server:
        yield server


@pytest.fixture(scope="module")
def small(sd15_like):
    """A server of a model that draws nonsense, fast, and has no adaptors."""
    with serving(str(sd15_like)) as server:
        yield server


@pytest.fixture(scope="module")
def adapted():
    model = hipa.load("emoji")
    sample.apply_lora(model, hipa.SHORT_NAMES["emoji"] / sample.LORA_NAME)
    return model


def post(server, request, path="/draw", **headers):
    """-> status, the answer: parsed JSON, or a sentence"""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    answer = response.read().decode()
    return response.status, json.loads(answer) if response.status == 200 else answer


def raw(server, data):
    """Sends bytes, nothing more -> everything that comes back"""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(2**16), b"")).decode()


def png(url):
    """A data URL -> PIL picture, as Save writes it"""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def url(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def one_sentence(answer):
    return 10 < len(answer) < 200 and "\n" not in answer and "Traceback" not in answer and "0x" not in answer


# ------------------------------------------------------------------------------------------------------- pictures
def test_it_draws_what_hipa_sample_draws(server, adapted):
    status, answer = post(server, {"prompt": "a red apple", "seed": 7})
    (expected,) = to_pil(hipa.sample(adapted, ["a red apple"], [7], steps=1))
    assert status == 200 and same(png(answer["picture"]), expected)
    assert 0 < answer["ms"]["step"] <= answer["ms"]["total"]


@pytest.mark.parametrize("job", ["draw", "3 steps", "editing", "inpainting", "super-resolution"])
def test_save_gives_the_file_that_sample_py_writes(server, tmp_path, capsys, job):
    image, mask = Image.new("RGB", (48, 40), "red"), Image.new("L", (48, 40))
    image.paste("white", (10, 10, 30, 40))
    mask.paste(255, (20, 5, 40, 25))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    argv, request = ["a cat, and: a café", "--seed", 5, "--out", tmp_path], {"prompt": "a cat, and: a café", "seed": 5}
    if job == "3 steps":
        argv, request = [*argv, "--steps", 3], request | {"steps": 3, "adaptors": 0}
    elif job != "draw":
        argv, request = [*argv, "--image", tmp_path / "image.png"], request | {"image": url(image)}
    if job == "inpainting":
        argv, request = [*argv, "--mask", tmp_path / "mask.png"], request | {"mask": url(mask)}
    if job == "super-resolution":
        argv, request = [*argv, "--scale", 2], request | {"scale": 2}
    code, (path,), _ = run_sample(argv, capsys)
    written, (status, answer) = Image.open(path), post(server, request)
    saved = png(answer["picture"])
    assert code == 0 and status == 200
    assert same(saved, written) and saved.text == written.text
    assert answer["name"] in Path(path).name
    if job == "inpainting":
        assert same(np.asarray(saved)[np.asarray(mask) == 0], np.asarray(image)[np.asarray(mask) == 0])
        assert not same(saved, image)


def test_without_adaptors_it_is_the_frozen_model_and_nothing_drifts(server):
    frozen, fade = hipa.load("emoji"), server.painter.fade
    (plain,) = to_pil(hipa.sample(frozen, ["an owl"], [1], steps=1))
    first = post(server, {"prompt": "an owl", "seed": 1})[1]["picture"]
    seen = {first}
    for weight in (0.3, 1.5, 0.05):
        seen.add(post(server, {"prompt": "an owl", "seed": 1, "adaptors": weight})[1]["picture"])
    assert len(seen) == 4
    assert post(server, {"prompt": "an owl", "seed": 1, "adaptors": 1})[1]["picture"] == first
    assert same(png(post(server, {"prompt": "an owl", "seed": 1, "adaptors": 0})[1]["picture"]), plain)
    for path, layer in fade.layers.items():
        assert torch.equal(layer.weight, frozen.unet.get_submodule(path).weight)


def test_the_views_are_the_loss_s_and_the_figure_s(server, adapted):
    answer = post(server, {"prompt": "a robot", "views": True})[1]
    x = live.to_tensor(png(answer["picture"]))[None]
    assert answer["spectrum"] == live.radial_power(x).tolist() and len(answer["spectrum"]) == 33
    assert same(png(answer["sobel"]), to_pil(2 * live.sobel(x / 2 + 0.5) - 1)[0])
    assert abs(np.asarray(png(answer["high_pass"])).mean() - 127.5) < 2  # around grey
    plain = post(server, {"prompt": "a robot", "views": True, "adaptors": 0})[1]
    assert sum(plain["spectrum"][16:]) < 0.5 * sum(answer["spectrum"][16:])  # what the project is about


def test_a_model_without_adaptors(small):
    status, answer = post(small, {"prompt": "a dog", "adaptors": 0.5})
    assert status == 200 and small.painter.facts["adaptors"] is None
    assert "Lora" not in png(answer["picture"]).text["parameters"]


# ------------------------------------------------------------------------------------------------------- nonsense
def bomb():
    """A PNG of 30,000 x 30,000 pixels in 2 kB, by its header"""
    data = bytearray(base64.b64decode(url(Image.new("1", (8, 8))).partition(",")[2]))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    return base64.b64encode(bytes(data)).decode()


def test_200_malformed_requests(small):
    whole = url(Image.new("RGB", (32, 32), "blue"))
    wrong = [-1, 1.5, "7", True, [], {}, 2**64, 10**400, float("nan"), float("inf"), -0.1, "a" * 1001]
    requests = [{field: value} for field in ("seed", "steps", "scale", "number") for value in wrong]
    requests += [{"adaptors": value} for value in wrong if value != 1.5]
    requests += [{"image": whole, "strength": value} for value in [*wrong, 0, 1.01]]
    requests += [{field: value} for field in ("prompt", "page") for value in wrong if value != "7"]
    pictures = ["", "a", "data:,", whole[:-40], whole.replace("A", "B"), bomb(), url(Image.new("RGB", (2, 2)), "BMP"),
                url(Image.new("RGB", (2, 2)), "GIF"), url(Image.new("L", (1025, 1024)), "JPEG"),
                url(Image.new("RGB", (500, 100))), *[w for w in wrong if not isinstance(w, str)]]  # fmt: skip
    requests += [{"image": picture} for picture in pictures]
    requests += [{"image": whole, "mask": picture} for picture in pictures]
    requests += [{"mask": whole}, {"scale": 2}, {"strength": 0.5}, {"image": whole, "mask": whole, "scale": 2}]
    requests += [{"image": url(Image.new("RGB", (300, 300))), "scale": 8}]
    requests += [{"file": "/etc/passwd"}, {"lora": "x"}, {"prompt": "a", "size": 9999}, [], 1, None, "a cat", True]
    bodies = [json.dumps(request).encode() for request in requests]
    bodies += [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"seed": 1e999}', b'{"seed": ' + b"9" * 9999 + b"}"]
    bodies += [b'{"prompt": "a cat", "seed": 1}'[:length] for length in range(1, 29)]  # cut off
    results = [post(small, body) for body in bodies]
    paths = ["/", "/x", "/draw/..", "/../hipa.py", "/draw?x"]
    results += [post(small, {"prompt": "a"}, path) for path in paths]
    for request, (status, answer) in zip([*bodies, *paths], results, strict=True):
        assert 400 <= status < 500 and one_sentence(answer), (request[:99], status, answer)

    host = "Host: 127.0.0.1\r\n"
    get, draw = "GET / HTTP/1.1\r\n", "POST /draw HTTP/1.1\r\n" + host
    lines = [
        f"GET {path} HTTP/1.1\r\n{host}" for path in ("/../hipa.py", "/live/__main__.py", "/%2e%2e/", 70_000 * "a")
    ]
    lines += [f"{method} / HTTP/1.1\r\n{host}" for method in ("PUT", "DELETE", "OPTIONS", "HEAD ", "X")]
    lines += [
        "GET / HTTP/9.9\r\n" + host,
        "GARBAGE\r\n",
        "\x00\x01\r\n",
        get,
        get + 200 * "X: y\r\n",
        get + host + host,
    ]
    lines += [get + f"Host: {name}\r\n" for name in ("evil.example", "127.0.0.1.evil.example", "evil.example:80")]
    lines += [get + host + "Origin: null\r\n", draw, draw + "Transfer-Encoding: chunked\r\n"]
    lines += [draw + f"Content-Length: {length}\r\n" for length in ("99", "-1", "²", "1e3", 500 * "9")]
    for line in lines:
        head, _, body = raw(small, line.encode() + b"\r\n{").partition("\r\n\r\n")
        assert " 4" in head.splitlines()[0] and one_sentence(body), (line[:90], head, body)
    assert len(results) + len(lines) >= 200
    assert post(small, {"prompt": "a dog"})[0] == 200


def test_a_body_too_large_is_refused_in_words(small):
    status, answer = post(small, b" " * (live.MOST_BYTES + 1))
    assert status == 413 and one_sentence(answer)


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "evil.example:8000"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
    {"Origin": "http://localhost:1"}, {"Origin": "https://127.0.0.1"}, {"Origin": ""},
])  # fmt: skip
def test_foreign_pages_are_refused(small, headers):
    status, answer = post(small, {"prompt": "a dog"}, **headers)
    assert status == 403 and one_sentence(answer)


def test_the_own_page_is_served(small):
    own = small.address[:-1]
    for name in (own, own.replace("127.0.0.1", "localhost")):
        assert post(small, {"prompt": "a dog"}, Host=name[7:], Origin=name)[0] == 200
    assert small.server_address[0] == "127.0.0.1"


def test_the_page_is_all_in_one_file(small):
    connection = http.client.HTTPConnection(*small.server_address)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert page.count("http") == 1 and "http://www.w3.org/2000/svg" in page  # a name, never fetched
    assert not any(word in page for word in ("<link rel=\"stylesheet", "import(", "src=\"", "@import"))  # fmt: skip


# ----------------------------------------------------------------------------------------------------- many at once
def test_200_requests_from_8_threads(small):
    jobs = list(itertools.islice(itertools.cycle(itertools.product(["a cat", "a dog", "red"], range(5))), 200))
    model = small.painter.model
    expected = {job: to_pil(hipa.sample(model, [job[0]], [job[1]], steps=1))[0] for job in set(jobs)}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda job: post(small, {"prompt": job[0], "seed": job[1]}), jobs))
    for job, (status, answer) in zip(jobs, answers, strict=True):
        assert status == 200 and same(png(answer["picture"]), expected[job])


def until(condition, seconds=30):
    for _ in range(100 * seconds):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_the_newest_request_of_a_page_wins(small):
    painter, gate = small.painter, threading.Event()
    painter.thread.submit(gate.wait)  # the painter is busy
    with ThreadPoolExecutor(4) as pool:
        answers = []
        for page, number in (("one", 1), ("one", 2), ("two", 1), ("one", 3)):
            answers.append(pool.submit(post, small, {"prompt": "a dog", "page": page, "number": number}))
            until(lambda page=page, number=number: painter.newest.get(page) == number)
        gate.set()
        assert [answer.result()[0] for answer in answers] == [409, 409, 200, 200]
    assert post(small, {"prompt": "a dog", "page": "one", "number": 2})[0] == 409
    assert post(small, {"prompt": "a dog", "page": "one", "number": 3})[0] == 200
    for k in range(live.MOST_PAGES + 5):
        painter.newest[f"page {k}"] = 1
    post(small, {"prompt": "a dog", "page": "new"})
    assert len(painter.newest) == live.MOST_PAGES


@pytest.mark.parametrize("end", ["newer", "closed"])
def test_many_steps_stop_when_nobody_waits_for_them(small, monkeypatch, end):
    steps, outcome, answer = [], [], live.Painter.answer
    begun = threading.Event()

    def watched(self, asked):
        gone, asked.gone = asked.gone, lambda: steps.append(1) or begun.set() or time.sleep(0.05) or gone()
        try:
            return answer(self, asked)
        except live.Outdated:
            outcome.append("outdated")
            raise

    monkeypatch.setattr(live.Painter, "answer", watched)
    body = json.dumps({"prompt": "a dog", "steps": 50, "page": end, "number": 1}).encode()
    with socket.create_connection(small.server_address) as connection:
        connection.sendall(b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert begun.wait(30)
        if end == "newer":
            assert post(small, {"prompt": "a dog", "page": end, "number": 2})[0] == 200
    until(lambda: outcome)
    assert outcome == ["outdated"] and len(steps) < 40


# ------------------------------------------------------------------------------------------------------ the command
def test_the_command():
    argv = [sys.executable, "live", "--port"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Ctrl-C is ignored by what a shell starts in the background, and so by what that starts, unless it is told.
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen([*argv, "0"], cwd=ROOT, **pipes, **listen)
    try:
        address = process.stdout.readline().strip()
        host, port = address.removeprefix("http://").rstrip("/").split(":")
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", "/model")
        assert json.loads(connection.getresponse().read())["model"] == "emoji" and host == "127.0.0.1"
        taken = subprocess.run([*argv, port], cwd=ROOT, capture_output=True, text=True)
        assert taken.returncode == 2 and taken.stderr.startswith("error: --port") and taken.stderr.count("\n") == 1
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == ""


# ------------------------------------------------------------------------------------------------------- a browser
def chromium(folder, width=1280, height=900, scale=1):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={folder / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))  # this one: Selenium downloads none
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return browser


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    browser = chromium(tmp_path)
    try:
        yield browser
        # No script failed, nothing was refused. What is outdated is Chromium's "Conflict".
        assert [entry for entry in browser.get_log("browser") if "409" not in entry["message"]] == []
    finally:
        browser.quit()


class Page:
    """What a test sees of the page and does to it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get("about:blank")  # so that another # loads it anew
        browser.get(address)

    def __getitem__(self, selector):
        return self.browser.find_element("css selector", selector)

    def js(self, script):
        return self.browser.execute_script("return " + script)

    def picture(self, row="hipa"):
        return self[f"[data-row={row}] img"].get_attribute("src")

    def drawn(self, alt, row="hipa", other_than=None):
        """Waits for a picture of this prompt, and until the page rests -> its data URL"""
        image = f"[data-row={row}] img"
        until(
            lambda: (self[image].get_attribute("alt") or "").startswith(alt + ", ") and self.picture(row) != other_than
        )
        until(lambda: self.js("busy === null"))
        return self.picture(row)


def test_type_slide_and_compare(server, adapted, browser, tmp_path):
    page = Page(browser, server.address)
    page.drawn("a cat")
    page["#prompt"].send_keys(" on a blue background")  # the field has the focus from the beginning
    picture = page.drawn("a cat on a blue background")
    assert same(png(picture), to_pil(hipa.sample(adapted, ["a cat on a blue background"], [0], steps=1))[0])
    assert "ms" in page["#trip"].text and "ms" in page["[data-row=hipa] .ms"].text

    line = page["polyline"].get_attribute("points")
    page["#adaptors"].send_keys("\ue012" * 6)  # arrow to the left
    faded = page.drawn("a cat on a blue background", other_than=picture)
    assert page["#fader output"].text == "0.70"
    assert not same(png(faded), png(picture)) and page["polyline"].get_attribute("points") != line

    page["#compare"].send_keys(" ")
    many = page.drawn("a cat on a blue background", "many")
    frozen = hipa.load("emoji")
    assert same(png(many), to_pil(hipa.sample(frozen, ["a cat on a blue background"], [0], steps=25))[0])
    assert page.js("document.querySelectorAll('polyline').length") == 3
    page["#adaptors"].send_keys("\ue011")  # home: 0
    assert same(png(page.drawn("a cat on a blue background", other_than=faded)), png(page.picture("plain")))

    until(lambda: "adaptors=0&" in browser.current_url)
    last, link = page.picture(), browser.current_url
    again = Page(browser, link)
    assert again.drawn("a cat on a blue background") == last and again["#compare"].is_selected()

    again["#die"].click()
    again.drawn("a cat on a blue background", other_than=last)
    seed = int(again["#seed"].get_attribute("value"))
    again["[data-row=hipa] a"].click()  # Save
    saved = tmp_path / f"{seed}-a-cat-on-a-blue-background.png"
    until(saved.is_file)
    assert f"Seed: {seed}, Size: 64x64, Model: emoji" in Image.open(saved).text["parameters"]


def test_edit_inpaint_and_enlarge(server, browser, tmp_path):
    from selenium.webdriver import ActionChains

    page = Page(browser, server.address + "#prompt=a+panda&seed=3")
    given = page.drawn("a panda")
    page["[value=inpainting]"].send_keys(" ")
    assert "paint" in page["#error"].text  # no hole yet
    canvas = page["#source canvas"]
    ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(60, 40).release().perform()
    page["#prompt"].clear()
    page["#prompt"].send_keys("a robot")
    painted = page.drawn("a robot", other_than=given)
    hole = np.array(page.js("[...source.hole]")).reshape(64, 64) > 0
    before, after = np.asarray(png(given)), np.asarray(png(painted))
    assert 50 < hole.sum() < 1000 and not page["#error"].is_displayed()
    assert same(before[~hole], after[~hole]) and not same(before[hole], after[hole])

    page["#clear"].click()
    canvas.send_keys("\ue012\ue012 \ue013 ")  # the keyboard's brush: left, left, paint, up, paint
    page.drawn("a robot", other_than=painted)
    assert 50 < page.js("source.hole.reduce((a, b) => a + b)") < hole.sum()

    page["[value=editing]"].send_keys(" ")
    edited = page.drawn("a robot", other_than=page.picture())
    assert page["#strength"].get_attribute("value") == "0.7"
    until(lambda: "job=editing" in browser.current_url)
    again = Page(browser, browser.current_url)  # the link knows what the given picture was drawn from
    assert again.drawn("a robot") == edited

    again["[value=super-resolution]"].send_keys(" ")
    assert png(again.drawn("a robot", other_than=edited)).size == (128, 128)

    Image.new("RGB", (300, 200), "orange").save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    again["[value=editing]"].send_keys(" ")
    until(lambda: png(again.picture()).size == (64, 64))
    again["#file"].send_keys(str(tmp_path / "photo.jpg"))
    until(lambda: png(again.picture()).size == (64, 43))
    again["#file"].send_keys(str(tmp_path / "text.png"))
    until(lambda: "not a picture" in again["#error"].text)


def test_for_every_eye_and_hand(server, browser):
    page = Page(browser, server.address)
    page.drawn("a cat")
    controls = "[...document.querySelectorAll('input, select, button, canvas, svg[role]')]"
    named = "(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())"
    assert page.js(f"{controls}.filter((e) => !{named}).map((e) => e.id)") == []
    colours = set()
    for scheme, width in itertools.product(("light", "dark"), (390, 800, 1280)):
        features = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", "reduce")]
        media = {"features": [{"name": name, "value": value} for name, value in features]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for job in ("draw", "editing", "inpainting", "super-resolution"):
            page.js(f"chooseJob('{job}')")
            assert page.js("document.documentElement.scrollWidth") <= width, (job, width)
        colours.add(page.js("getComputedStyle(document.body).backgroundColor"))
        assert page.js("getComputedStyle(document.querySelector('img')).transitionDuration") == "0s"
    assert len(colours) == 2
    until(lambda: page.js("busy === null"))


def screenshot(path):
    """docs/live.png"""
    import tempfile

    with serving("emoji") as server, tempfile.TemporaryDirectory() as folder:
        browser = chromium(Path(folder), width=1088, height=1170)
        try:
            page = Page(browser, server.address + "#prompt=a+panda+on+a+blue+background&seed=3&compare=true")
            page.drawn("a panda on a blue background", "many")
            for _ in range(5):  # the times shown are one reading, of the fifth drawing
                page.js("Object.values(ROWS).forEach((row) => { row.asked = null; }), changed()")
                page.drawn("a panda on a blue background")
            time.sleep(1)  # until the pictures have faded in
            browser.save_screenshot(str(path))
        finally:
            browser.quit()
    Image.open(path).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    screenshot(ROOT / "docs" / "live.png")
