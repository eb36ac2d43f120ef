"""The live page answers with what sample.py writes, to the bit, or with one sentence; slow: what a browser shows."""

import base64
import http.client
import io
import itertools
import json
import re
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
from safetensors.torch import save_file

from conftest import ROOT, run_sample  # puts the project's root where `live` is found

import hipa  # isort: skip
import sample  # isort: skip
from lora import add_lora, factors, lora_bytes  # isort: skip
from live import __main__ as live  # isort: skip
from live.figure import chromium, until  # isort: skip


@contextmanager
def serving(model, port=0):
    """A server of a model, or of a painter, in a thread."""
    painter = model if isinstance(model, live.Painter) else live.Painter(model, device="cpu")
    with live.Server(port, painter) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server():
    with serving("emoji") as server:
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A server of a model without adaptors."""
    folder = tmp_path_factory.mktemp("plain")
    for path in hipa.SHORT_NAMES["emoji"].iterdir():
        if path.name != sample.LORA_NAME:
            (folder / path.name).symlink_to(path)
    with serving(str(folder)) as server:
        yield server


def post(server, request, path="/draw", **headers):
    """-> status, the answer: parsed JSON, or a sentence"""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    answer = response.read().decode()
    return response.status, json.loads(answer) if response.status == 200 else answer


def raw(server, data):
    """Sends bytes, nothing more -> status, the answer"""
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        head, _, body = b"".join(iter(lambda: connection.recv(2**16), b"")).decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


def png(url):
    """A data URL -> PIL picture, as Save writes it"""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def url(picture, kind="PNG"):
    picture.save(file := io.BytesIO(), kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def one(model, prompt, seed=0, steps=1):
    return sample.to_pil(hipa.sample(model, [prompt], [seed], steps))[0]


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def one_sentence(answer):
    return 10 < len(answer) < 200 and "\n" not in answer and "Traceback" not in answer and "0x" not in answer


# ------------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("job", ["draw", "3 steps", "editing", "inpainting"])
def test_save_gives_the_file_that_sample_py_writes(server, tmp_path, capsys, job):
    image, mask = Image.new("RGB", (24, 20), "red"), Image.new("L", (24, 20))
    mask.paste(255, (10, 3, 20, 12))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    options, fields = [], {}
    if job == "3 steps":
        options, fields = ["--steps", 3], {"steps": 3, "adaptors": 0}
    elif job != "draw":
        options, fields = ["--image", tmp_path / "image.png"], {"image": url(image)}
    if job == "inpainting":
        options, fields = [*options, "--mask", tmp_path / "mask.png"], fields | {"mask": url(mask)}
    prompt = "a cat, and: a café"
    code, (path,), _ = run_sample([prompt, "--seed", 5, "--out", tmp_path, *options], capsys)
    status, answer = post(server, {"prompt": prompt, "seed": 5} | fields)
    written, saved = Image.open(path), png(answer["picture"])
    assert code == 0 and status == 200 and same(saved, written) and saved.text == written.text
    assert f"{answer['name']}.png" in Path(path).name and answer["ms"] > 0


def test_the_slider_and_the_views(server):
    """Weight 0 is the frozen model, to the bit, however often the slider moved. The views are the loss's and the
    figure's, and show what the project is about."""
    frozen, request = hipa.load("emoji"), {"prompt": "a robot", "seed": 1}
    on = post(server, request)[1]
    seen = {on["picture"], *(post(server, request | {"adaptors": w})[1]["picture"] for w in (0.3, 1.5, 0.05))}
    assert len(seen) == 4 and post(server, request | {"adaptors": 1})[1]["picture"] == on["picture"]
    off = post(server, request | {"adaptors": 0})[1]
    assert same(png(off["picture"]), one(frozen, "a robot", 1))
    server.painter.fade(0)
    for path, layer in server.painter.fade.layers.items():
        assert torch.equal(layer.weight, frozen.unet.get_submodule(path.removeprefix("unet.")).weight)

    x = sample.to_tensor(png(on["picture"]))[None]
    assert on["spectrum"] == live.radial_power(x).tolist() and len(on["spectrum"]) == 33
    assert same(png(on["sobel"]), sample.to_pil(2 * live.sobel(x / 2 + 0.5) - 1)[0])
    assert abs(np.asarray(png(on["high_pass"])).mean() - 127.5) < 2  # around grey
    assert sum(off["spectrum"][16:]) < 0.5 * sum(on["spectrum"][16:])


def test_several_adaptors(sd15_like, tmp_path, capsys):
    """At 1 the slider gives what sample.py makes of them, at 0 the frozen model, to the bit, of both networks."""
    model, files = hipa.load(sd15_like), [tmp_path / name for name in ("hipa.safetensors", "style.safetensors")]
    torch.manual_seed(0)
    add_lora(model.unet, 2)
    for _, B in factors(model.unet).values():
        B.data.normal_(std=0.1)
    files[0].write_bytes(lora_bytes(model.unet, {"hipa": "{}"}))
    path = "text_model_encoder_layers_1_mlp_fc1"
    save_file({f"lora_te_{path}.lora_down.weight": torch.randn(2, 48), f"lora_te_{path}.lora_up.weight":
               torch.randn(80, 2)}, files[1])  # fmt: skip
    painter = live.Painter(str(sd15_like), loras=[str(files[0]), f"{files[1]}:-0.5"])
    assert painter.facts["adaptors"] == 1 and len(painter.fade.layers) == len(factors(model.unet)) + 1
    argv = ["a cat", "--model", sd15_like, "--out", tmp_path, "--lora", files[0], "--lora", f"{files[1]}:-0.5"]
    _, (made,), _ = run_sample(argv, capsys)
    on, half, off = (painter.draw({"prompt": "a cat", "adaptors": weight})["picture"] for weight in (1, 0.5, 0))
    assert same(png(on), Image.open(made)) and png(on).text == Image.open(made).text
    assert all(
        words in png(half).text["parameters"] for words in ("/hipa.safetensors:0.5 + ", "/style.safetensors:-0.25")
    )
    assert same(png(off), one(hipa.load(sd15_like), "a cat")) and not same(png(half), png(on))


def test_words_that_the_model_does_not_know(server, sd15_like):
    """The embedded model's examples are known to it; of another checkpoint, words in pieces say nothing."""
    examples = server.painter.facts["examples"]
    assert len(examples) == 74 and examples[0] == "a cat"
    for prompt, unknown in [("a photo of a zebra, on Red!", "photo, zebra"), *((name, "") for name in examples[::9])]:
        notes = post(server, {"prompt": prompt})[1]["notes"]
        assert notes == ([f"the model never saw a picture of: {unknown}"] if unknown else []), prompt
    (note,) = post(server, {"prompt": 40 * "a cat " + "on a rocket"})[1]["notes"]
    assert "only 30 of the prompt's 83 tokens are used; left out: a cat" in note and note.endswith("on a rocket")
    other = live.Painter(str(sd15_like))
    assert other.facts["examples"] == [] == other.draw({"prompt": "zebra"})["notes"]


def test_nothing_to_paint(plain):
    whole, mask = url(Image.new("RGB", (32, 32), "blue")), url(Image.new("L", (32, 32)))
    status, answer = post(plain, {"image": whole, "mask": mask})
    assert status == 400 and "paint over" in answer


def test_no_picture_of_nan(plain, monkeypatch):
    monkeypatch.setattr(hipa, "sample", lambda *_, **__: torch.full((1, 3, 64, 64), torch.nan))
    status, answer = post(plain, {"prompt": "a cat"})
    assert status == 400 and "not finite" in answer


# ------------------------------------------------------------------------------------------------------- nonsense
def test_malformed_requests_are_answered_by_one_sentence(plain):
    whole, tiny = url(Image.new("RGB", (32, 32), "blue")), Image.new("RGB", (2, 2))
    bomb = bytearray(base64.b64decode(whole.partition(",")[2]))
    bomb[16:24] = (30000).to_bytes(4, "big") * 2  # by its header 30,000 pixels wide and high
    wrong = [-1, True, [], {}, 2**64, 10**400, float("nan"), float("inf"), -0.1, "a" * 1001]
    fields = ["seed", "steps", "scale", "number", "adaptors", "strength", "prompt", "page", "image"]
    requests = [{field: value} for field in fields for value in wrong]
    requests += [{"image": whole, field: value} for field in ("strength", "mask") for value in [*wrong, 1.01]]
    files = [url(tiny, "BMP"), url(tiny, "GIF"), url(tiny.resize((500, 100))), url(tiny.resize((1025, 1024)))]
    files += ["a", "data:,", whole[:-40], whole.replace("A", "B"), base64.b64encode(bytes(bomb)).decode()]
    requests += [{"image": file} for file in files] + [{"image": whole, "mask": file} for file in files]
    requests += [{"seed": 1.5}, {"seed": "7"}, {"seed": 2**53}, {"file": "x"}, [], 1]
    bodies = [json.dumps(request).encode() for request in requests]
    bodies += [b"", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"seed": 1e999}', b'{"seed": ' + b"9" * 9999 + b"}"]
    bodies += [b'{"prompt": "a cat", "seed": 1}'[:length] for length in range(1, 29)]  # cut off
    answers = [(body[:99], *post(plain, body)) for body in bodies]
    answers += [(path, *post(plain, {"prompt": "a"}, path)) for path in ("/", "/x", "/draw/..", "/../hipa.py")]

    host, get = "Host: 127.0.0.1\r\n", "GET / HTTP/1.1\r\n"
    draw = "POST /draw HTTP/1.1\r\n" + host
    firsts = ["GET /../hipa.py HTTP/1.1", "GET /draw HTTP/1.1", "POST / HTTP/1.1"]
    lines = [f"{first}\r\n{host}" for first in firsts]
    lines += [get, get + host + host, draw]
    lengths = ("99", "-1", "²", "1e3", 500 * "9", live.MOST_BYTES + 1)
    lines += [f"{draw}Content-Length: {length}\r\n" for length in lengths]
    lines += [draw + "Transfer-Encoding: chunked\r\n"]
    answers += [(line[:90], *raw(plain, line.encode() + b"\r\n{")) for line in lines]
    for request, status, answer in answers:  # what is no HTTP at all is answered by http.server
        assert 400 <= status < 500 and one_sentence(answer), (request, status, answer)
    assert post(plain, {"prompt": "a dog"})[0] == 200


def test_only_this_machine_s_own_page_is_answered(plain):
    """A foreign page names itself in Origin; or gives its own name our address, and then Host is that name."""
    own = plain.address[:-1]
    assert plain.server_address[0] == "127.0.0.1"
    for name in (own, own.replace("127.0.0.1", "localhost")):
        assert post(plain, {"prompt": "a dog"}, Host=name[7:], Origin=name)[0] == 200
    foreign = [{"Origin": o} for o in ("http://evil.example", "null", "http://localhost:1", "https://127.0.0.1", "")]
    foreign += [{"Host": host} for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example")]
    for headers in foreign:
        status, answer = post(plain, {"prompt": "a dog"}, **headers)
        assert status == 403 and one_sentence(answer), headers
    assert raw(plain, b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")[0] == 403


def test_the_page_is_all_in_one_file(plain):
    connection = http.client.HTTPConnection(*plain.server_address)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert page.count("http") == 1 and "http://www.w3.org/2000/svg" in page  # a name, never fetched
    assert not any(word in page for word in ('<link rel="stylesheet', "import(", 'src="', "@import"))


# ----------------------------------------------------------------------------------------------------- many at once
def test_many_requests_from_8_threads(plain):
    """Of a model without adaptors, so that their weight has no effect."""
    jobs = [*itertools.product(["a cat", "a dog", "red"], range(4))]
    expected = {job: one(plain.painter.model, *job) for job in jobs}
    requests = [{"prompt": prompt, "seed": seed, "adaptors": 0.5} for prompt, seed in 3 * jobs]
    with ThreadPoolExecutor(8) as pool:
        answers = [png(answer["picture"]) for _, answer in pool.map(lambda request: post(plain, request), requests)]
    assert all(same(answer, expected[job]) for job, answer in zip(3 * jobs, answers, strict=True))
    assert plain.painter.facts["adaptors"] is False and "Lora" not in answers[0].text["parameters"]


def test_the_newest_request_of_a_page_wins(plain):
    painter, gate, answers = plain.painter, threading.Event(), []
    painter.thread.submit(gate.wait)  # the painter is busy
    with ThreadPoolExecutor(4) as pool:
        for page, number in (("one", 1), ("one", 2), ("two", 1), ("one", 3)):
            answers.append(pool.submit(post, plain, {"prompt": "a dog", "page": page, "number": number}))
            until(lambda page=page, number=number: painter.newest.get(page) == number)
        gate.set()
        assert [answer.result()[0] for answer in answers] == [409, 409, 200, 200]
    assert post(plain, {"prompt": "a dog", "page": "one", "number": 2})[0] == 409


def test_many_steps_stop_when_the_page_sends_a_newer_request(plain):
    steps, request = [], {"prompt": "a dog", "page": "stops", "number": 1}
    hook = plain.painter.model.unet.register_forward_hook(lambda *_: steps.append(time.sleep(0.05)))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, plain, request | {"steps": 50})
        until(lambda: steps)
        assert post(plain, request | {"number": 2})[0] == 200 and answer.result()[0] == 409
    hook.remove()
    assert len(steps) < 40


def test_a_hundred_connections_at_once():
    """They wait to be accepted; none is refused or reset."""
    with live.Server(0) as server:  # accepts none yet
        connections = [socket.create_connection(server.server_address, timeout=2) for _ in range(100)]
        for connection in connections:
            connection.close()


# ------------------------------------------------------------------------------------------------------ the command
def test_mistakes_on_the_command_line(plain, tmp_path):
    save_file({"unet.nothing.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    taken, other = str(plain.server_address[1]), str(tmp_path / "other.safetensors")
    for argv in (["--port", taken], ["--port", "70000"], ["--model", "nowhere"], ["--lora", other]):
        with pytest.raises(hipa.UserError) as error:
            live.main(["--port", "0", *argv])
        assert one_sentence(str(error.value).replace(str(tmp_path), "")), argv


@pytest.mark.slow
def test_the_command():
    """Ctrl-C ends it at once, whatever it is drawing."""
    # Ctrl-C is ignored by what a shell starts in the background, and so by what that starts, unless it is told.
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "cwd": ROOT, "text": True}
    pipe, command = subprocess.PIPE, [sys.executable, "live", "--port", "0"]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, **listen) as process:
        address = process.stdout.readline().strip().removeprefix("http://").rstrip("/")
        connection = http.client.HTTPConnection(address)
        connection.request("GET", "/")
        assert b'{"model": "emoji"' in connection.getresponse().read() and "127.0.0.1" in address
        waiting = [http.client.HTTPConnection(address) for _ in range(20)]
        for connection in waiting:  # together they take a minute
            connection.request("POST", "/draw", json.dumps({"steps": 50}))
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10) == ("", "") and process.returncode == 130


# ------------------------------------------------------------------------------------------------------- a browser
@pytest.fixture(scope="module")
def window(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    folder = tmp_path_factory.mktemp("browser")
    with chromium(folder) as browser:
        browser.folder = folder  # of downloads
        yield browser


@pytest.fixture
def browser(window):
    resize(window, 1440, 900)
    yield window
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    # No script failed, and nothing was refused but drawings.
    assert [entry for entry in window.get_log("browser") if "/draw - Failed to load" not in entry["message"]] == []


def resize(browser, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


class Page:
    """What can be seen of the page and done to it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get("about:blank")  # so that another # loads it anew
        browser.get(address)

    def __getitem__(self, selector):
        return self.browser.find_element("css selector", selector)

    def js(self, script):
        return self.browser.execute_script("return " + script)

    def set(self, name, value):
        self.js(f"$('{name}').value = {json.dumps(value)}, void changed()")

    def picture(self, row="hipa"):
        """A data URL"""
        return self[f"[data-row={row}] img"].get_attribute("src")

    def rested(self):
        until(lambda: self.js("!busy && !document.querySelector('figure:not([hidden]).late')"))

    def shown(self, prompt, row="hipa", other_than=None):
        """Waits for a picture of this prompt, and until the page rests -> the picture"""
        alt = f"document.querySelector('[data-row={row}] img').alt"
        until(lambda: self.js(alt).startswith(prompt + ", ") and self.picture(row) != other_than)
        self.rested()
        return self.picture(row)

    def mouse(self, kind, at, **more):
        """A mouse event at a pixel (x, y) of the given picture"""
        box = self.js("canvas.getBoundingClientRect()")
        x, y = (box[start] + (k + 0.5) / 64 * box["width"] for start, k in zip(("left", "top"), at, strict=True))
        event = {"type": f"mouse{kind}", "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1} | more
        self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def hole(self):
        """The painted pixels, (64, 64)"""
        data = "[...source.hole.getContext('2d').getImageData(0, 0, 64, 64).data].filter((_, k) => k % 4 === 3)"
        return np.array(self.js(data)).reshape(64, 64) > 127


@pytest.mark.slow
def test_type_slide_compare_and_save(server, browser):
    frozen, model, prompt = hipa.load("emoji"), hipa.load("emoji"), "a cat on a blue background"
    sample.apply_lora(model, hipa.SHORT_NAMES["emoji"] / sample.LORA_NAME)
    page = Page(browser, server.address)
    until(lambda: page.picture())
    assert page["#compare"].is_selected()  # from the beginning
    elements = "[...document.querySelectorAll('input, select, button, canvas, svg[role]')]"
    named = "(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())"
    assert page.js(f"{elements}.filter((e) => !{named}).map((e) => e.id)") == []
    page["#prompt"].send_keys(" on a blue background")  # the field has the focus from the beginning
    picture = page.shown(prompt)
    assert same(png(picture), one(model, prompt)) and "ms" in page["#trip"].text
    assert same(png(page.picture("many")), one(frozen, prompt, steps=25))
    page["#adaptors"].send_keys("\ue012" * 6)  # arrow to the left
    faded = page.shown(prompt, other_than=picture)
    assert page["output"].text == "0.7"
    page["#adaptors"].send_keys("\ue011")  # home: 0
    last = page.shown(prompt, other_than=faded)
    assert same(png(last), png(page.picture("plain")))

    until(lambda: "adaptors=0&" in browser.current_url)
    again = Page(browser, browser.current_url)  # the link knows the state
    until(lambda: again.picture() == last)
    assert again["#compare"].is_selected()
    again["#die"].click()
    again.shown(prompt, other_than=last)
    seed = int(again["#seed"].get_attribute("value"))
    for row, name in (("hipa", "hipa-one-step"), ("plain", "plain-one-step"), ("many", "25-steps")):
        again[f"[data-row={row}] a"].click()  # Save
        until((saved := browser.folder / f"{seed}-a-cat-on-a-blue-background-{name}.png").is_file)
        assert f"Size: 64x64, Model: emoji, Seed: {seed}" in Image.open(saved).text["parameters"]


@pytest.mark.slow
def test_one_screen(server, browser):
    """All that is shown in a lecture is in view, and the green line climbs from the red one to the blue one."""
    page = Page(browser, server.address + "#prompt=a+panda&seed=3&compare=on")
    page.shown("a panda", "many")
    boxes = "[...document.querySelectorAll('#prompt, #examples, #adaptors, figure img, #spectrum')]"
    boxes += ".map((e) => e.getBoundingClientRect()).map((b) => [b.left, b.top, b.right, b.bottom])"
    for job, (width, height) in itertools.product(("draw", "inpainting"), ((1440, 900), (1024, 768))):
        page[f"[value={job}]"].click()
        resize(browser, width, height)
        found = np.array(page.js(boxes))
        assert len(found) == 13 and (found >= 0).all() and (found <= [width, height, width, height]).all(), (job, width)
        assert page.js("document.documentElement.scrollHeight") <= height
        assert found[-1, 3] - found[-1, 1] > 250  # the plot
    page["[value=draw]"].click()

    def line(row):
        points = page.js(f"document.querySelector('polyline[data-row={row}]').getAttribute('points')").split(",")
        return np.array(points, float)[17::2]  # y, of the upper half of the frequencies

    green = {}
    for weight in (0, 0.5, 1):
        page.set("adaptors", weight)
        page.rested()
        green[weight] = line("hipa")
    assert np.abs(green[0] - line("plain")).max() < 1e-6
    assert green[0].mean() > green[0.5].mean() > green[1].mean()  # y points down
    assert np.abs(green[1] - line("many")).mean() < 0.3 * np.abs(green[0] - line("many")).mean()
    resize(browser, 390, 844)  # nothing is cut off on a phone
    assert page.js("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_what_is_older_than_the_newest_request_fades(server, browser):
    """So do its line in the plot, and no late answer comes back. What is shown as a time is the median of five."""
    page = Page(browser, server.address + "#prompt=a+panda&compare=on")
    page.shown("a panda", "many")
    late = "[...document.querySelectorAll('figure.late')].map((figure) => figure.dataset.row)"
    lines = "[...document.querySelectorAll('polyline')].map((line) => line.dataset.row)"
    assert page.js(late) == [] and page.js(lines) == ["hipa", "plain", "many"]
    page.set("prompt", "a fox")
    until(lambda: page.js(f"[{late}, {lines}]") == [["plain", "many"], ["hipa"]])
    until(lambda: page.js("document.querySelector('[data-row=plain] img').alt").startswith("a fox"))
    page.js("rests = []")
    page.js("rest = setTimeout, setTimeout = (go, ms) => { rests.push(ms); return rest(go, ms); }")
    page.js("$('prompt').value = 'a cow', void changed()")  # the 25 steps of the fox are under way
    page.set("prompt", "a bee")
    page.shown("a bee", "many")
    assert page.js("rests") == [300]  # the bee did not wait for the cow's
    assert page.js("ROWS.many.times.length") == 2 and page.js(lines) == ["hipa", "plain", "many"]
    page.js("ROWS.hipa.times = [900, 1, 2, 900, 3]")
    page["#compare"].click()
    page.set("prompt", "a dog")
    page.shown("a dog")
    times = page.js("ROWS.hipa.times")
    assert times[:4] == [1, 2, 900, 3] and len(times) == 5
    assert page["[data-row=hipa] span"].text == f"{sorted(times)[2]:.0f} ms"


@pytest.mark.slow
def test_a_server_that_does_not_answer_or_starts_again(server, browser):
    page = Page(browser, server.address + "#prompt=a+panda")
    first, gate = page.shown("a panda"), threading.Event()
    server.painter.thread.submit(gate.wait, 20)  # seconds at most
    page.js("patience = 400")
    page.set("prompt", "a fox")
    until(lambda: "does not answer" in page["#note"].text and page.js("!busy"))
    assert page.picture() == first and page.js("getComputedStyle(document.querySelector('.late img')).opacity") < "0.4"
    page.js("patience = 60000")
    gate.set()
    page.shown("a fox")  # by itself
    with serving(server.painter) as other:
        page = Page(browser, other.address + "#prompt=a+panda")
        page.shown("a panda")
    page.set("prompt", "a bee")
    until(lambda: "does not answer" in page["#note"].text)
    with serving(server.painter, other.server_address[1]):
        page.shown("a bee")
        until(lambda: page["#note"].text == "")


@pytest.mark.slow
def test_words_examples_seeds_and_dropped_text(server, browser):
    page = Page(browser, server.address + "#prompt=a+zebra")
    page.shown("a zebra")
    assert page["#note"].text == "the model never saw a picture of: zebra"
    page["#examples"].send_keys("a dog")  # a native list
    page.shown("a dog")
    assert page["#note"].text == "" and page["#prompt"].get_attribute("value") == "a dog"
    for seed, message in (("9007199254740993", "Seed: "), ("", "Seed: "), ("1.5", "Seed: "), ("9007199254740991", "")):
        page.set("seed", seed)
        until(lambda message=message: page["#note"].text[:6] == message and page.js("!busy"))
    page.rested()
    assert page.js("JSON.parse(ROWS.hipa.asked).seed") == 2**53 - 1
    box = page.js("$('prompt').getBoundingClientRect()")
    data = {"items": [{"mimeType": "text/plain", "data": "a fox or "}], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": box["left"] + 15, "y": box["top"] + box["height"] / 2, "data": data}
        browser.execute_cdp_cmd("Input.dispatchDragEvent", event)
    until(lambda: "a fox or " in page["#prompt"].get_attribute("value"))
    page.shown(page["#prompt"].get_attribute("value"))


@pytest.mark.slow
def test_the_hole(server, browser):
    page = Page(browser, server.address + "#prompt=a+panda&seed=3")
    given = page.shown("a panda")
    page["[value=inpainting]"].send_keys(" ")
    until(lambda: "paint over" in page["#note"].text)  # no hole yet
    box = page.js("canvas.getBoundingClientRect()")
    page.mouse("Pressed", (20, 40))  # the first stroke, which makes the message disappear
    page.mouse("Moved", (30, 40))
    page.mouse("Released", (30, 40), buttons=0)
    painted, hole = page.shown("a panda", other_than=given), page.hole()
    rows, columns = np.nonzero(hole)
    brush = page.js("Number($('brush').value)")
    assert abs(rows.mean() - 40) < 1 and abs(columns.mean() - 25) < 1 and abs(np.ptp(rows) + 1 - brush) <= 2
    before, after = np.asarray(png(given)), np.asarray(png(painted))
    assert same(before[~hole], after[~hole]) and not same(before[hole], after[hole]) and page["#note"].text == ""
    assert page.js("canvas.getBoundingClientRect()") == box  # it did not jump under the pointer

    page.mouse("Moved", (5, 5), buttons=0, button="none")
    for button, number in (("right", 2), ("middle", 4)):
        page.mouse("Pressed", (10, 10), button=button, buttons=number)
        page.mouse("Moved", (20, 10), button=button, buttons=number)
        page.mouse("Released", (20, 10), button=button, buttons=0)
    assert same(page.hole(), hole)
    page.mouse("Pressed", (50, 10))
    stamped = page.hole()
    page.mouse("Moved", (50, 30), buttons=0, button="none")  # the release was lost
    page.mouse("Moved", (60, 60))
    assert same(page.hole(), stamped) and not same(stamped, hole)
    page.mouse("Released", (60, 60), buttons=0)
    page["#undo"].click()
    assert same(page.hole(), hole)
    box = page.js("canvas.getBoundingClientRect()")
    fingers = [{"x": box["left"] + x, "y": box["top"] + 20, "id": k} for k, x in enumerate((20, box["width"] - 20))]
    for kind, points in (("Start", fingers[:1]), ("Start", fingers), ("Move", fingers), ("End", [])):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    assert 0 < (page.hole() & ~hole).sum() < 2 * brush**2  # one stamp, no line
    page["#undo"].click(), page["#undo"].click()
    assert not page.hole().any()


@pytest.mark.slow
def test_given_pictures(server, browser, tmp_path):
    page = Page(browser, server.address + "#prompt=a+panda&seed=3")
    panda = page.shown("a panda")
    page["[value=editing]"].send_keys(" ")
    edited = page.shown("a panda", other_than=panda)
    page["[value=draw]"].send_keys(" ")
    page.shown("a panda", other_than=edited)
    page.set("prompt", "a fox")
    fox = page.shown("a fox")
    page["[value=editing]"].send_keys(" ")  # edits the newest that was drawn
    page.shown("a fox", other_than=fox)
    given = "source.picture.toDataURL()"
    assert same(png(page.js(given)).convert("RGB"), png(fox))

    Image.new("RGB", (200, 300), "orange").save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    circle = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'><circle cx='4' cy='4' r='4' fill='red'/></svg>"
    (tmp_path / "circle.svg").write_text(circle)
    page["#file"].send_keys(str(tmp_path / "photo.jpg"))
    until(lambda: png(page.picture()).size == (43, 64))
    sizes = "[canvas, document.querySelector('[data-row=hipa] img')].map((e) => [e.clientWidth, e.clientHeight])"
    assert page.js(sizes)[0] == page.js(sizes)[1]
    shot = np.asarray(Image.open(io.BytesIO(page["canvas"].screenshot_as_png)).convert("RGB")).astype(int)
    orange = np.nonzero(np.ptp(shot[len(shot) // 2], axis=1) > 40)[0]  # in the middle of a square; the margins are grey
    assert shot.shape[0] == shot.shape[1] and abs(orange.mean() / len(shot) - 0.5) < 0.02
    assert abs(np.ptp(orange) / len(shot) - 43 / 64) < 0.03
    page["[value=inpainting]"].send_keys(" ")  # keeps the file
    page.mouse("Pressed", (20, 50))
    page.mouse("Released", (20, 50), buttons=0)
    rows, columns = np.nonzero(page.hole()[:, :43])
    assert abs(columns.mean() - 9.5) < 1 and abs(rows.mean() - 50) < 1
    page["#file"].send_keys(str(tmp_path / "text.png"))
    until(lambda: "not a picture" in page["#note"].text)
    page["#file"].send_keys(str(tmp_path / "circle.svg"))
    until(lambda: png(page.js(given)).getpixel((25, 25))[:3] == (255, 0, 0))
    page["#take"].click()
    assert same(png(page.js(given)).convert("RGB"), png(fox))


@pytest.mark.slow
def test_contrast_and_forced_colours(server, browser):
    """Text has a contrast of 4.5 at least. The browser shows which job is selected, in any colours."""
    page = Page(browser, server.address + "#prompt=a+zebra")
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colours = "['body', '#note', 'label', 'small', 'h2 ~ p', 'figcaption', 'text'].map((name) => "
        colours += "getComputedStyle(document.querySelector(name))[name === 'text' ? 'fill' : 'color'])"
        page.rested()
        paper, *inks = page.js(f"[getComputedStyle(document.body).backgroundColor, ...{colours}]")
        for ink in inks:
            a, b = (luminance(colour) for colour in (paper, ink))
            assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5, (scheme, ink)
    looks = "[...document.querySelectorAll('[name=job]')].map((e) => getComputedStyle(e).appearance)"
    assert page.js(looks) == 3 * ["auto"]


def luminance(colour):
    """Relative luminance of "rgb(1, 2, 3)", as WCAG defines it"""
    channels = np.array([int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
    ]
