"""The live page answers with what sample.py writes, to the bit, or with one sentence; slow: what a browser shows."""

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
from live.figure import Page, chromium, resize, serving, until  # isort: skip


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
@pytest.mark.parametrize("job", ["draw", "3 steps", "editing", "inpainting", "super-resolution"])
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
    if job == "super-resolution":
        options, fields = [*options, "--scale", 2], fields | {"scale": 2}
    prompt = "a cat, and: a café"
    code, (path,), _ = run_sample([prompt, "--seed", 5, "--out", tmp_path, *options], capsys)
    status, answer = post(server, {"prompt": prompt, "seed": 5} | fields)
    written, saved = Image.open(path), png(answer["picture"])
    assert code == 0 and status == 200 and same(saved, written) and saved.text == written.text
    assert answer["name"] in Path(path).name and 0 < answer["ms"]["step"] <= answer["ms"]["total"]


def test_the_slider_and_the_views(server):
    """Weight 0 is the frozen model, to the bit, however often the slider moved. The views are the loss's and the
    figure's, and show what the project is about."""
    frozen, request = hipa.load("emoji"), {"prompt": "a robot", "seed": 1, "views": True}
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


def test_nothing_to_paint(plain):
    whole, mask = url(Image.new("RGB", (32, 32), "blue")), url(Image.new("L", (32, 32)))
    status, answer = post(plain, {"image": whole, "mask": mask})
    assert status == 400 and "nothing in the mask is white" in answer


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
    fields = ["seed", "steps", "scale", "number", "adaptors", "prompt", "page", "image"]
    requests = [{field: value} for field in fields for value in wrong]
    requests += [{"image": whole, field: value} for field in ("strength", "mask") for value in [*wrong, 0, 1.01]]
    files = [url(tiny, "BMP"), url(tiny, "GIF"), url(tiny.resize((500, 100))), url(tiny.resize((1025, 1024)), "JPEG")]
    files += ["", "a", "data:,", whole[:-40], whole.replace("A", "B"), base64.b64encode(bytes(bomb)).decode()]
    requests += [{"image": file} for file in files] + [{"image": whole, "mask": file} for file in files if file]
    requests += [{"mask": whole}, {"scale": 2}, {"strength": 0.5}, {"image": whole, "mask": whole, "scale": 2}]
    requests += [
        {"seed": 1.5},
        {"seed": "7"},
        {"image": url(tiny.resize((300, 300))), "scale": 8},
        {"file": "x"},
        [],
        1,
    ]
    bodies = [json.dumps(request).encode() for request in requests]
    bodies += [b"", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"seed": 1e999}', b'{"seed": ' + b"9" * 9999 + b"}"]
    bodies += [b'{"prompt": "a cat", "seed": 1}'[:length] for length in range(1, 29)]  # cut off
    answers = [(body[:99], *post(plain, body)) for body in [*bodies, b" " * (live.MOST_BYTES + 1)]]
    assert answers[-1][1] == 413
    answers += [(path, *post(plain, {"prompt": "a"}, path)) for path in ("/", "/x", "/draw/..", "/../hipa.py")]

    host, get = "Host: 127.0.0.1\r\n", "GET / HTTP/1.1\r\n"
    draw = "POST /draw HTTP/1.1\r\n" + host
    firsts = [
        "GET /../hipa.py HTTP/1.1",
        f"GET {70_000 * 'a'} HTTP/1.1",
        "PUT / HTTP/1.1",
        "X / HTTP/1.1",
        "GET / HTTP/9.9",
    ]
    lines = [f"{first}\r\n{host}" for first in firsts]
    lines += ["GARBAGE\r\n", "\0\r\n", get, get + 200 * "X: y\r\n", get + host + host, draw]
    lines += [f"{draw}Content-Length: {length}\r\n" for length in ("99", "-1", "²", "1e3", 500 * "9")]
    lines += [draw + "Transfer-Encoding: chunked\r\n"]
    answers += [(line[:90], *raw(plain, line.encode() + b"\r\n{")) for line in lines]
    for request, status, answer in answers:
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
    assert raw(plain, b"GET /model HTTP/1.1\r\nHost: evil.example\r\n\r\n")[0] == 403


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
    assert plain.painter.facts["adaptors"] is None and "Lora" not in answers[0].text["parameters"]


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
    painter.newest.update({f"page {k}": 1 for k in range(live.MOST_PAGES + 5)})
    post(plain, {"prompt": "a dog", "page": "new"})
    assert len(painter.newest) == live.MOST_PAGES


@pytest.mark.parametrize("end", ["newer", "closed"])
def test_many_steps_stop_when_nobody_waits_for_them(plain, end):
    steps, body = [], json.dumps({"prompt": "a dog", "steps": 50, "page": end, "number": 1}).encode()
    hook = plain.painter.model.unet.register_forward_hook(lambda *_: steps.append(time.sleep(0.05)))
    with socket.create_connection(plain.server_address) as connection:
        connection.sendall(b"POST /draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: steps)
        if end == "newer":
            assert post(plain, {"prompt": "a dog", "page": end, "number": 2})[0] == 200
    plain.painter.thread.submit(int).result()  # when its turn comes, the painter is free
    hook.remove()
    assert len(steps) < 40


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
        address = process.stdout.readline().strip()
        connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"))
        connection.request("GET", "/model")
        assert json.loads(connection.getresponse().read())["model"] == "emoji" and "127.0.0.1" in address
        image = url(Image.new("RGB", (256, 256)))
        connection.request("POST", "/draw", json.dumps({"image": image, "scale": 2, "steps": 50}))  # takes a minute
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10) == ("", "") and process.returncode == 130


# ------------------------------------------------------------------------------------------------------- a browser
@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    with chromium(tmp_path) as browser:
        yield browser
        # No script failed, nothing was refused. What is outdated is Chromium's "Conflict".
        assert [entry for entry in browser.get_log("browser") if "409" not in entry["message"]] == []


@pytest.mark.slow
def test_type_slide_compare_and_save(server, browser, tmp_path):
    frozen, model, prompt = hipa.load("emoji"), hipa.load("emoji"), "a cat on a blue background"
    sample.apply_lora(model, hipa.SHORT_NAMES["emoji"] / sample.LORA_NAME)
    page = Page(browser, server.address)
    page.shown("a cat")
    elements = "[...document.querySelectorAll('input, select, button, canvas, svg[role]')]"
    named = "(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())"
    assert page.js(f"{elements}.filter((e) => !{named}).map((e) => e.id)") == []
    page["#prompt"].send_keys(" on a blue background")  # the field has the focus from the beginning
    picture, line = page.shown(prompt), page["polyline"].get_attribute("points")
    assert same(png(picture), one(model, prompt)) and "ms" in page["#trip"].text
    page["#adaptors"].send_keys("\ue012" * 6)  # arrow to the left
    faded = page.shown(prompt, other_than=picture)
    assert page["#fader output"].text == "0.70" and page["polyline"].get_attribute("points") != line
    page["#compare"].send_keys(" ")
    assert same(png(page.shown(prompt, "many")), one(frozen, prompt, steps=25))
    page["#adaptors"].send_keys("\ue011")  # home: 0
    last = page.shown(prompt, other_than=faded)
    assert same(png(last), png(page.picture("plain")))

    until(lambda: "adaptors=0&" in browser.current_url)
    again = Page(browser, browser.current_url)  # the link knows the state
    assert again.shown(prompt) == last and again["#compare"].is_selected()
    again["#die"].click()
    again.shown(prompt, other_than=last)
    seed = int(again["#seed"].get_attribute("value"))
    again["[data-row=hipa] a"].click()  # Save
    until((saved := tmp_path / f"{seed}-a-cat-on-a-blue-background.png").is_file)
    assert f"Size: 64x64, Model: emoji, Seed: {seed}" in Image.open(saved).text["parameters"]


@pytest.mark.slow
def test_edit_inpaint_and_enlarge(server, browser, tmp_path):
    from selenium.webdriver import ActionChains

    page = Page(browser, server.address + "#prompt=a+panda&seed=3")
    given = page.shown("a panda")
    page["[value=inpainting]"].send_keys(" ")
    assert "paint" in page["#error"].text  # no hole yet
    canvas = page["#source canvas"]
    ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(60, 40).release().perform()
    painted = page.shown("a panda", other_than=given)
    hole = np.array(page.js("[...source.hole]")).reshape(64, 64) > 0
    before, after = np.asarray(png(given)), np.asarray(png(painted))
    assert 50 < hole.sum() < 1000 and not page["#error"].is_displayed()
    assert same(before[~hole], after[~hole]) and not same(before[hole], after[hole])
    page["#clear"].click()
    canvas.send_keys("\ue012\ue012 \ue013 ")  # the keyboard's brush: left, left, paint, up, paint
    painted = page.shown("a panda", other_than=painted)
    assert 50 < page.js("source.hole.reduce((a, b) => a + b)") < hole.sum()

    for width in (390, 800, 1280):  # nothing is cut off, on a phone either
        resize(browser, width, 900)
        assert page.js("document.documentElement.scrollWidth") <= width, width

    page["[value=editing]"].send_keys(" ")
    edited = page.shown("a panda", other_than=painted)
    until(lambda: "job=editing" in browser.current_url)
    again = Page(browser, browser.current_url)  # the link knows of what the given picture was made
    assert again.shown("a panda") == edited
    again["[value=super-resolution]"].send_keys(" ")
    assert png(again.shown("a panda", other_than=edited)).size == (128, 128)
    again["[value=editing]"].send_keys(" ")
    Image.new("RGB", (300, 200), "orange").save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    again["#file"].send_keys(str(tmp_path / "photo.jpg"))
    until(lambda: png(again.picture()).size == (64, 43))
    again["#file"].send_keys(str(tmp_path / "text.png"))
    until(lambda: "not a picture" in again["#error"].text)
