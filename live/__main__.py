"""The live page: type, and the picture follows, one step for each key stroke.

    python live --open                             # the embedded model; the page opens in the browser
    python live --model sd15 --lora adaptors.safetensors --device cuda

Python's own http.server and one page, index.html, for this machine only. Requests and answers are JSON, the pictures
are the PNGs that sample.py writes. From top to bottom: the adaptors' slider; what a request may say; drawing; HTTP.
"""

import base64
import contextlib
import io
import json
import os
import sys
import time
import warnings
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

MOST_BYTES = 2**23  # of a request
RADIUS = 0.25  # of the high-pass view's disc, as in train.py


class Outdated(UserError):
    """The page has sent a newer request: status 409."""


# --------------------------------------------------------------------------------------------- the adaptors' slider
class Fader:
    """Sets the weights of a ModuleDict (`unet`, `text_encoder`) to W + weight * B A: at 0 the frozen model to the bit,
    at 1 what sample.py merges. Always from the kept W, so that nothing drifts however often the slider moves. The last
    sum is kept too: going to the frozen model and back, as a comparison does, costs nothing."""

    def __init__(self, nets):
        self.nets, self.loras, self.layers, self.kept = nets, [], {}, {0: {}}  # kept {weight: {module path: tensor}}

    def add(self, factors, weight):
        """Adaptors of one file, {module path: (A, B)}, with a weight of their own. ValueError: for another network"""
        self(0)
        self.loras.append((factors, weight))
        self.layers |= {path: self.nets.get_submodule(path) for path in factors}
        self.kept = {0: {path: layer.weight.data for path, layer in self.layers.items()}}
        self(1)

    def __call__(self, weight):
        for path, tensor in self.kept.get(weight, self.kept[0]).items():
            self.layers[path].weight.data = tensor
        if weight not in self.kept:
            for factors, own in self.loras:
                merge(self.nets, factors, weight * own)  # makes new tensors, so what is kept stays
            self.kept = {0: self.kept[0], weight: {path: layer.weight.data for path, layer in self.layers.items()}}


# ------------------------------------------------------------------------------------------- what a request may say
FIELDS = {  # name: default, kinds, least, most (of text: how many characters)
    "prompt": ("", (str,), 0, 1000),
    "seed": (0, (int,), 0, 2**53 - 1),  # the largest whole number of JavaScript
    "steps": (1, (int,), 1, 50),
    "adaptors": (1, (float, int), 0, 1.5),
    "image": ("", (str,), 0, MOST_BYTES),  # a PNG in base64, with or without the beginning of a data URL
    "mask": ("", (str,), 0, MOST_BYTES),
    "strength": (0, (float, int), 0, 1),  # 0: the job's own
    "page": ("", (str,), 0, 40),
    "number": (0, (int,), 0, 2**53 - 1),  # which of its page's requests this is
}


def check(request):
    """What the page sent -> a namespace with every field, of the right kind and within its bounds. Raises UserError."""
    if not isinstance(request, dict) or not request.keys() <= FIELDS.keys():
        raise UserError(f"a request is a JSON object of {', '.join(FIELDS)}")
    asked = {name: request.get(name, field[0]) for name, field in FIELDS.items()}
    for name, (_, kinds, least, most) in FIELDS.items():
        size = len(asked[name]) if isinstance(asked[name], str) else asked[name]
        if type(asked[name]) not in kinds or not least <= size <= most:  # bool is an int by isinstance; nan is nowhere
            raise UserError(f"{name}: {kinds[0].__name__} from {least} to {most}{' characters' * (str in kinds)}")
    return SimpleNamespace(**asked)


def decode(text, read):
    """Base64 of a PNG file -> what `read` makes of the file, unless it is too large."""
    with contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError, UserError):
        file = io.BytesIO(base64.b64decode(text.rpartition(",")[2], validate=True))
        with Image.open(file, formats=["PNG"]) as header:  # decodes no pixel yet
            short, long = sorted(header.size)
        if short * long <= 2**20 and long <= 4 * short:
            return read(file)
    raise UserError("image and mask are PNGs of at most a million pixels, at most four times as long as wide")


# ------------------------------------------------------------------------------------------------------- the drawing
class Painter:
    """A loaded model, which draws one request at a time: always in the same thread, because each new one would start
    PyTorch's workers anew."""

    def __init__(self, name, device="auto", dtype=None, loras=None):
        device = sample.choose_device(device)
        dtype = getattr(torch, dtype or ("float16" if device == "cuda" else "float32"))
        folder = hipa.find_checkpoint(name, half=dtype != torch.float32)
        self.loras = [lora for text in loras or [None] if (lora := sample.find_lora(text, folder, steps=1))]
        self.model = hipa.load(folder, device, dtype)
        nets = torch.nn.ModuleDict({"unet": self.model.unet, "text_encoder": self.model.text_encoder})
        self.fade = Fader(nets)
        for path, weight in self.loras:
            with reading(path):
                self.fade.add(load_lora(path, nets), weight)
        examples = folder / "prompts.txt"  # what the embedded model can draw: "🐱 a cat, a cat face, a kitten"
        lines = examples.read_text("utf-8").splitlines() if examples.exists() else []
        examples = [line.partition(" ")[2].split(", ")[0] for line in lines if line[:1] not in "#"]
        self.facts = {"model": name, "device": device, "examples": examples, "adaptors": bool(self.loras)}
        self.facts |= {"side": self.model.side, "strength": hipa.STRENGTH, "radius": RADIUS}
        self.thread, self.newest = ThreadPoolExecutor(max_workers=1), {}  # {page: number}
        self.draw({"prompt": "a cat"})  # the first drawing is slow: not on the user's time

    def draw(self, request):
        """A request, parsed JSON -> the answer, for JSON. Waits for its turn. Raises UserError and Outdated."""
        asked = check(request)
        self.newest[asked.page] = max(asked.number, self.newest.get(asked.page, 0))
        return self.thread.submit(self.answer, asked).result()

    def outdated(self, asked):
        if asked.number < self.newest.get(asked.page, 0):
            raise Outdated("the page has sent a newer request")

    def answer(self, asked):
        """Draws what is asked for, unless the page has thought better of it, and shows it as the loss sees it."""
        self.outdated(asked)
        image = decode(asked.image, lambda file: sample.read_picture(file)[0]) if asked.image else None
        mask = decode(asked.mask, lambda file: sample.read_mask(file, image.size)) if image and asked.mask else None
        if mask and not mask.getbbox():
            raise UserError("paint over what is to be drawn anew")
        size, options = sample.picture_size(self.model, image=image), {"steps": asked.steps}
        if image:
            asked.strength = asked.strength or hipa.STRENGTH["inpainting" if mask else "editing"]
            options |= {"image": image, "mask": mask, "strength": asked.strength}
        if asked.steps > 1:  # one step is finished, or no picture ever would be while the slider moves
            options["progress"] = lambda: self.outdated(asked)
        self.fade(asked.adaptors)
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as notes:  # a prompt that is too long
            warnings.simplefilter("always")
            (picture,) = sample.make_pictures(self.model, [asked.prompt], [asked.seed], size, **options)
        ms = round(1000 * (time.perf_counter() - start), 1)
        if not picture:
            raise UserError("the picture is not finite (NaN or inf): the weights are damaged, or need --dtype float32")
        notes = [str(note.message) for note in notes]
        unknown = [word for word, tokens in self.model.tokenizer.tokenize(asked.prompt) if len(tokens) > 1]
        if unknown and self.facts["examples"]:  # the embedded model's tokenizer learned each word of its prompts as one
            notes.append(f"the model never saw a picture of: {', '.join(unknown)}")
        x = sample.to_tensor(picture)[None]  # (1, 3, H, W)
        side, unit = min(x.shape[2:]), x / 2 + 0.5
        high, edges = (sample.to_pil(2 * view - 1)[0] for view in (high_pass(unit, RADIUS) + 0.5, sobel(unit)))
        return {
            "picture": png(picture, self.parameters(asked, size)), "high_pass": png(high), "sobel": png(edges),
            "spectrum": radial_power(x[..., :side, :side]).tolist(), "ms": ms, "notes": notes,
            "name": f"{asked.seed}-{sample.slug(asked.prompt)}",
        }  # fmt: skip

    def parameters(self, asked, size):
        """What sample.py writes into the PNG. The page's pictures have no names of their own."""
        loras = (f"{'/'.join(path.parts[-2:])}:{weight * asked.adaptors:g}" for path, weight in self.loras)
        metadata = {
            "Steps": asked.steps, "Sampler": "DPM++ 2M trailing",
            "CFG scale": f"{self.model.guidance_at(asked.steps):g}", "Size": f"{size[0]}x{size[1]}",
            "Model": self.facts["model"], "Lora": asked.adaptors and " + ".join(loras),
            "Image": asked.image and "image.png", "Denoising strength": asked.image and f"{asked.strength:g}",
            "Mask": asked.mask and "mask.png", "Seed": str(asked.seed),
        }  # fmt: skip
        return f"{asked.prompt}\n" + ", ".join(f"{key}: {value}" for key, value in metadata.items() if value)


def png(picture, parameters=None):
    """PIL picture -> data URL; `parameters` as sample.py's files have them."""
    file, info = io.BytesIO(), PngInfo()
    if parameters:
        info.add_text("parameters", parameters.encode("utf-8", "replace").decode())
    picture.save(file, "PNG", pnginfo=info, compress_level=6 if parameters else 1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------------- HTTP
# The page is all in one file, and the browser is told so: it may load nothing, from nowhere.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
POLICY += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Server(ThreadingHTTPServer):
    """On this machine alone. One thread a connection; the drawing itself is the painter's."""

    request_queue_size = 128  # connections that wait to be accepted; 5, the default, are too few for some tabs

    def __init__(self, port, painter=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.painter, self.address = painter, f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for a request that does not come
    disable_nagle_algorithm = True  # else the body can wait 40 ms for the browser to acknowledge the headers

    def do_GET(self):
        status, kind, asked = 200, "plain", f"{self.command} {self.path}"
        try:
            if not self.local():
                status, body = 403, "this page is for this machine alone"
            elif asked == "GET /":
                facts = json.dumps(self.server.painter.facts).replace("<", "\\u003c")  # does not end the script
                body, kind = (HERE / "index.html").read_text("utf-8").replace("FACTS", facts), "html"
            elif asked == "POST /draw":
                body = json.dumps(self.server.painter.draw(self.read()))
            else:
                status, body = 404, "there is nothing at this address"
        except UserError as error:
            status, body = 409 if isinstance(error, Outdated) else 400, str(error)
        except Exception:  # out of memory, say: the terminal has the details, the page has a sentence
            self.server.handle_error(self.request, self.client_address)
            status, body = 500, "the drawing failed; the terminal says why"
        self.send_response(status)
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        with contextlib.suppress(OSError):  # a page that was closed before its answer came is no news
            self.end_headers()
            self.wfile.write(body.encode())

    do_POST = do_GET

    def read(self):
        """The request's JSON, parsed. Raises UserError."""
        try:
            length = int(self.headers.get("Content-Length", ""))
            return json.loads(self.rfile.read(length if 0 <= length <= MOST_BYTES else 0))
        except (TimeoutError, ValueError, RecursionError):
            raise UserError(f"a request is JSON; it says how long it is, {MOST_BYTES:,} bytes at most") from None

    def local(self):
        """Whether the request comes from this machine's own page. A foreign page can send one to us from the user's
        browser, which then names it (Origin), and it can give its own name our address (then Host is that name)."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        ours = len(hosts) == 1 and hosts[0].partition(":")[0] in ("127.0.0.1", "localhost")
        return ours and all(origin == f"http://{hosts[0]}" for origin in origins)

    def log_message(self, *_):
        pass


def main(argv=None):
    parser = sample.Parser(__doc__)
    add = parser.add_argument
    add("--model", default="emoji", help="a folder, a Hugging Face id, emoji, sd15, sd21 (%(default)s)")
    add("--lora", action="append", metavar="PATH[:WEIGHT]", help='adaptors; also several; or "none" (the model\'s own)')
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="(%(default)s)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="(float16 on cuda, else float32)")
    add("--port", type=sample.number(int, 0, 65535), default=8000, help="0: any that is free (%(default)s)")
    add("--open", action="store_true", help="open the page in the browser")
    args = parser.parse_args(argv)
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
