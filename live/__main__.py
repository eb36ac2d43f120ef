"""The live page: type, and the picture follows, one step for each key stroke.

    python live                                    # the embedded model; open the address that it prints
    python live --open                             # opens it too
    python live --model sd15 --lora adaptors.safetensors --device cuda

Python's own http.server and one page, index.html. It serves this machine only. The page asks in JSON and is answered in
JSON; its pictures are the PNGs that sample.py writes. A mistake is answered by one sentence. From top to bottom: the
adaptors' slider; what a request may say; drawing; HTTP.
"""

import base64
import io
import json
import os
import select
import socket
import sys
import threading
import time
import traceback
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "emoji")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402

import hipa  # noqa: E402
import sample  # noqa: E402
from evaluate import radial_power  # noqa: E402
from hipa import UserError, reading  # noqa: E402
from lora import load_lora, merge  # noqa: E402
from losses import high_pass, sobel  # noqa: E402
from sample import number, to_pil, to_tensor  # noqa: E402

MOST_BYTES = 16 * 2**20  # of a request's body
MOST_PIXELS = 2**20  # of a picture from the page
MOST_CHARACTERS = 1000  # of a prompt: the networks read about 70 words
MOST_TILES = 64  # models' pictures in an enlarged one, which is drawn tile by tile
MOST_PAGES = 1000  # whose newest request is remembered
RADIUS = 0.25  # of the high-pass view's disc, as in train.py


class Outdated(Exception):
    """The page has sent a newer request, or is gone."""


# --------------------------------------------------------------------------------------------- the adaptors' slider
class Fader:
    """Sets networks' weights to W + weight * B A: at weight 0 the frozen model to the bit, at 1 what sample.py merges.

    nets    a ModuleDict of `unet` and `text_encoder`
    loras   of one file or several: [({module path: (A, B)}, a weight of its own)]

    Always from the kept W, so that nothing drifts however often the slider moves. The last sum is kept too: going to
    the frozen model and back, as a comparison does, costs nothing.
    """

    def __init__(self, nets, loras):
        self.nets, self.loras = nets, loras
        self.layers = {path: nets.get_submodule(path) for factors, _ in loras for path in factors}
        self.kept = {0: {path: layer.weight.data for path, layer in self.layers.items()}}  # {weight: {path: tensor}}

    def __call__(self, weight):
        for path, tensor in self.kept.get(weight, self.kept[0]).items():
            self.layers[path].weight.data = tensor
        if weight not in self.kept:
            for factors, own in self.loras:
                merge(self.nets, factors, weight * own)  # makes new tensors, so what is kept stays
            summed = {path: layer.weight.data for path, layer in self.layers.items()}
            self.kept = {0: self.kept[0], weight: summed}


# ------------------------------------------------------------------------------------------- what a request may say
NUMBERS = {  # name: kind, least, most, default
    "seed": (int, 0, 2**63 - 1, 0),
    "steps": (int, 1, 50, 1),
    "adaptors": (float, 0, 1.5, 1.0),
    "strength": (float, 0.01, 1, None),  # of the job
    "scale": (int, 2, 8, None),  # given: super-resolution
    "number": (int, 0, 2**53, 0),  # which of its page's requests this is
}
TEXTS = {"prompt": MOST_CHARACTERS, "page": 40}  # name: most characters
PICTURES = ("image", "mask")  # base64, with or without the beginning of a data URL


def check(request):
    """What the page sent -> a namespace with every field, of the right kind and within its bounds. Raises UserError."""
    if not isinstance(request, dict) or not request.keys() <= {*NUMBERS, *TEXTS, *PICTURES, "views"}:
        raise UserError(f"a request is a JSON object of {', '.join([*TEXTS, *PICTURES, *NUMBERS])} and views")
    fields = {"views": request.get("views") is True}
    for name, (kind, least, most, default) in NUMBERS.items():
        value = request.get(name, default)
        whole = type(value) is int  # bool is an int too, by isinstance
        if value is not default and not ((whole or type(value) is kind) and least <= value <= most):  # false for nan
            what = "whole number" if kind is int else "number"
            raise UserError(f"{name} is a {what} from {least} to {most}")
        fields[name] = value
    for name, most in TEXTS.items():
        fields[name] = request.get(name, "")
        if not isinstance(fields[name], str) or len(fields[name]) > most:
            raise UserError(f"{name} is text of at most {most} characters")
    for name in PICTURES:
        fields[name] = request.get(name)
        if fields[name] == "" or not isinstance(fields[name], str | None):
            raise UserError(f"{name} is a picture file in base64")
    if not fields["image"] and (fields["mask"] or fields["scale"] or fields["strength"]):
        raise UserError("mask, scale and strength need an image, the picture that they are about")
    if fields["mask"] and fields["scale"]:
        raise UserError("mask and scale do not go together")
    return SimpleNamespace(**fields)


def decode(text, name, read):
    """Base64 of a picture file -> what `read` makes of the file, unless it is of an odd kind or too large."""
    picture = None
    try:
        file = io.BytesIO(base64.b64decode(text.rpartition(",")[2], validate=True))
        with Image.open(file, formats=["PNG", "JPEG"]) as header:  # decodes no pixel yet
            width, height = header.size
        if width * height <= MOST_PIXELS and max(width, height) <= 4 * min(width, height):
            picture = read(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, UserError):
        raise UserError(f"the {name} is not a PNG or JPEG picture, or it is damaged") from None
    if not picture:
        raise UserError(f"the {name} has more than {MOST_PIXELS:,} pixels, or is more than four times as long as wide")
    return picture


# ------------------------------------------------------------------------------------------------------- the drawing
class Painter:
    """A loaded model, which draws one request at a time: always in the same thread, because each new one would start
    PyTorch's workers anew."""

    def __init__(self, name, device="auto", dtype=None, loras=None):
        device = sample.choose_device(device)
        dtype = getattr(torch, dtype or ("float16" if device == "cuda" else "float32"))
        folder = hipa.find_checkpoint(name, half=dtype != torch.float32)
        found = [sample.find_lora(lora, folder, steps=1) for lora in loras or [None]]
        self.name, self.loras = name, [lora for lora in found if lora]
        self.model = hipa.load(folder, device, dtype)
        nets, read = torch.nn.ModuleDict({"unet": self.model.unet, "text_encoder": self.model.text_encoder}), []
        self.fade = Fader(nets, read)
        for path, weight in self.loras:
            self.fade(0)  # a Fader begins with the frozen weights
            with reading(path):
                read.append((load_lora(path, nets), weight))
                self.fade = Fader(nets, read)
                self.fade(1)  # or they are for another network
        self.facts = {
            "model": name, "device": device, "side": self.model.side, "strength": hipa.STRENGTH, "radius": RADIUS,
            "adaptors": 1.0 if self.loras else None,
        }  # fmt: skip
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.lock, self.newest = threading.Lock(), {}  # {page: number}
        self.draw({"prompt": "a cat"})  # the first drawing is slow: not on the user's time

    def draw(self, request, gone=lambda: False):
        """A request, parsed JSON -> the answer, for JSON. Waits for its turn. Raises UserError and Outdated.

        gone    says whether nobody waits for the answer any more
        """
        start, asked = time.perf_counter(), check(request)
        asked.gone = gone
        if asked.page:
            with self.lock:
                self.newest[asked.page] = max(asked.number, self.newest.pop(asked.page, 0))
                while len(self.newest) > MOST_PAGES:
                    del self.newest[next(iter(self.newest))]
        answer = self.thread.submit(self.answer, asked).result()
        answer["ms"]["total"] = round(1000 * (time.perf_counter() - start), 1)
        return answer

    def outdated(self, asked):
        if asked.number < self.newest.get(asked.page, 0) or asked.gone():
            raise Outdated

    def answer(self, asked):
        """Draws what is asked for, unless the page has thought better of it, and shows it as the loss sees it."""
        self.outdated(asked)
        image = decode(asked.image, "image", lambda file: sample.read_picture(file)[0]) if asked.image else None
        mask = decode(asked.mask, "mask", lambda file: sample.read_mask(file, image.size)) if asked.mask else None
        if mask and not mask.getbbox():
            raise UserError("nothing in the mask is white, so nothing would be painted")
        if image and asked.scale and asked.scale**2 * image.width * image.height > MOST_TILES * self.model.side**2:
            raise UserError("the enlarged picture would be too large for a live page: sample.py has no such limit")
        size, options = sample.picture_size(self.model, image=image), {"steps": asked.steps}
        if image:
            job = "super-resolution" if asked.scale else "inpainting" if mask else "editing"
            asked.strength = asked.strength or hipa.STRENGTH[job]
            options |= {"image": image, "mask": mask, "scale": asked.scale, "strength": asked.strength}
        if asked.steps > 1 or asked.scale:  # slow: stops in the midst of it. One step is finished, or no picture ever
            options["progress"] = lambda: self.outdated(asked)  # would be while the slider moves.
        self.fade(asked.adaptors)
        start = time.perf_counter()
        (picture,) = sample.make_pictures(self.model, [asked.prompt], [asked.seed], size, **options)
        step = time.perf_counter() - start
        if not picture:
            raise UserError("the picture is not finite (NaN or inf): the weights are damaged, or need --dtype float32")
        answer = {
            "picture": png(picture, self.parameters(asked, size)),
            "name": f"{asked.seed}-{sample.slug(asked.prompt)}.png",
            "ms": {"step": round(1000 * step, 1)},
        }
        if asked.views:
            x = to_tensor(picture)[None]  # (1, 3, H, W)
            side, unit = min(x.shape[2:]), x / 2 + 0.5
            answer["spectrum"] = radial_power(x[..., :side, :side]).tolist()
            answer["high_pass"], answer["sobel"] = (
                png(to_pil(2 * view - 1)[0]) for view in (high_pass(unit, RADIUS) + 0.5, sobel(unit))
            )
        return answer

    def parameters(self, asked, size):
        """What sample.py writes into the PNG. The page's pictures have no names of their own."""
        guidance = self.model.guidance_at(asked.steps)
        metadata = {"Steps": asked.steps, "Sampler": "DPM++ 2M trailing", "CFG scale": f"{guidance:g}"}
        metadata |= {"Size": f"{size[0]}x{size[1]}", "Model": self.name}
        if self.loras and asked.adaptors:
            names = ("/".join(path.parts[-2:]) + f":{weight * asked.adaptors:g}" for path, weight in self.loras)
            metadata["Lora"] = " + ".join(names)
        if asked.image:
            metadata |= {"Image": "image.png", "Denoising strength": f"{asked.strength:g}"}
            metadata |= {"Mask": "mask.png"} if asked.mask else {"Scale": asked.scale} if asked.scale else {}
        metadata["Seed"] = asked.seed
        return f"{asked.prompt}\n" + ", ".join(f"{key}: {value}" for key, value in metadata.items())


def png(picture, parameters=None):
    """PIL picture -> data URL; `parameters` as sample.py's files have them."""
    file, info = io.BytesIO(), PngInfo()
    if parameters:
        info.add_text("parameters", parameters.encode("utf-8", "replace").decode())
    picture.save(file, "PNG", pnginfo=info, compress_level=6 if parameters else 1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------------- HTTP
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # The page is all in one file, and the browser is told so: it may load nothing, from nowhere.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Server(ThreadingHTTPServer):
    """On this machine alone. One thread a connection; the drawing itself is the painter's."""

    def __init__(self, port, painter=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.painter, self.address = painter, f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a page that was closed before its answer came is no news
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for a request that does not come
    disable_nagle_algorithm = True  # else the body can wait 40 ms for the browser to acknowledge the headers

    def do_GET(self):
        if not self.local():
            self.reply(403, "this page is for this machine alone")
        elif self.path == "/":
            self.reply(200, (HERE / "index.html").read_bytes(), "text/html")
        elif self.path == "/model":
            self.reply(200, json.dumps(self.server.painter.facts), "application/json")
        else:
            self.reply(404, "there is nothing at this address")

    def do_POST(self):
        if not self.local():
            return self.reply(403, "this page is for this machine alone")
        if self.path != "/draw":
            return self.reply(404, "there is nothing at this address")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or self.headers.get("Transfer-Encoding"):
            return self.reply(400, "the request does not say how long it is")
        if len(length) > 15 or int(length) > MOST_BYTES:
            return self.reply(413, f"a request has at most {MOST_BYTES:,} bytes")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except TimeoutError:
            return self.reply(400, "the request did not come to its end")
        except (ValueError, RecursionError):  # what is cut off is not JSON either
            return self.reply(400, "the request is not JSON")
        try:
            self.reply(200, json.dumps(self.server.painter.draw(request, self.gone)), "application/json")
        except UserError as error:
            self.reply(400, str(error))
        except Outdated:
            self.reply(409, "the page has sent a newer request")
        except ConnectionError:  # the page went away
            raise
        except Exception:  # out of memory, say: the terminal has the details, the page has a sentence
            traceback.print_exc()
            self.reply(500, "the drawing failed; the terminal says why")

    def gone(self):
        """Whether the page has closed the connection, as closing or reloading it does."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def local(self):
        """Whether the request comes from this machine's own page. A foreign page can send one to us from the user's
        browser, which then names it (Origin), and it can give its own name our address (then Host is that name)."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        return (
            len(hosts) == 1
            and hosts[0].partition(":")[0] in ("127.0.0.1", "localhost")
            and all(origin == f"http://{hosts[0]}" for origin in origins)
        )

    def reply(self, status, body, kind="text/plain"):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):
        """What http.server itself finds wrong: methods unknown to it (501), headers too long, no HTTP at all."""
        self.request_version = "HTTP/1.0"  # to 0.9, the default, answers have no status
        self.reply(405 if code == 501 else 400, "this is not a request that the page would send")

    def finish(self):
        """Reads what is left of a refused body: if the connection closed on it, the answer could get lost."""
        super().finish()
        self.connection.settimeout(1)
        try:
            self.connection.shutdown(socket.SHUT_WR)  # the answer is complete
            while self.connection.recv(2**20):
                pass
        except OSError:
            pass

    def log_message(self, *_):
        pass


def parse_args(argv=None):
    parser = sample.Parser(__doc__)
    add = parser.add_argument
    add("--model", default="emoji", help="a folder, a Hugging Face id, emoji, sd15, sd21 (%(default)s)")
    add("--lora", action="append", metavar="PATH[:WEIGHT]", help='adaptors; also several; or "none" (the model\'s own)')
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="(%(default)s)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="(float16 on cuda, else float32)")
    add("--port", type=number(int, 0, 65535), default=8000, help="0: any that is free (%(default)s)")
    add("--open", action="store_true", help="open the page in the browser")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        server = Server(args.port)
    except OSError as error:
        raise UserError(f"--port {args.port}: {error.strerror}; try another one, or 0 for any") from None
    server.painter = Painter(args.model, args.device, args.dtype, args.lora)
    print(server.address, flush=True)
    if args.open:
        webbrowser.open(server.address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        os._exit(130)  # at once: else Python waits for the thread that draws, and PyTorch's own may complain


if __name__ == "__main__":
    sample.run(main)
