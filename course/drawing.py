"""What the exercises' pictures are made of: real pictures, the adapted model, line charts and sheets."""

import math

import torch
from PIL import Image, ImageDraw

COLOURS = ["#c03030", "#2060c0", "#208040", "#808080", "#c08020", "#8030a0"]


def real(m, name):
    """The first real picture of a thing such as "a cat", the first of its names in emoji/prompts.txt: (1, 3, 64, 64)"""
    lines = (m.hipa.SHORT_NAMES["emoji"] / "prompts.txt").read_text("utf-8").splitlines()
    names = [line.split(" ", 1)[1].split(",")[0] for line in lines if line and not line.startswith("#")]
    sheet = Image.open(m.hipa.SHORT_NAMES["emoji"] / "renders.png").convert("RGB")  # a row for each thing
    top = 64 * names.index(name)
    return m.sample.to_tensor(sheet.crop((0, top, 64, top + 64)))[None]


def adaptors(m, model):
    """HiPA's adaptors of the embedded model: {module path: (A, B)}"""
    loras = m.lora.load_lora(m.hipa.SHORT_NAMES["emoji"] / m.lora.LORA_NAME, torch.nn.ModuleDict({"unet": model.unet}))
    return {path.removeprefix("unet."): pair for path, pair in loras.items()}


def sheet(m, pictures, columns):
    """Pictures (B, 3, H, W) in [-1, 1], or PIL pictures -> one PIL picture, row by row, at twice their size"""
    pictures = m.sample.to_pil(pictures) if isinstance(pictures, torch.Tensor) else pictures
    picture = m.sample.grid(pictures, columns)
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


def stack(*pictures):
    """PIL pictures, one below the other."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    y = 0
    for each in pictures:
        whole.paste(each, (0, y))
        y += each.height
    return whole


def plot(series, x_label, y_label, logarithmic=False, size=(560, 260)):
    """{name: (xs, ys)} -> a line chart as a PIL picture."""

    def height(y):
        return math.log10(max(y, 1e-12)) if logarithmic else float(y)

    xs = [x for x_values, _ in series.values() for x in x_values]
    ys = [height(y) for _, y_values in series.values() for y in y_values]
    chart = Image.new("RGB", size, "white")
    draw, (left, right, top, bottom) = ImageDraw.Draw(chart), (60, size[0] - 15, 15, size[1] - 40)
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(x, y):
        across, up = (x - x0) / (x1 - x0 or 1), (height(y) - y0) / (y1 - y0 or 1)
        return left + across * (right - left), bottom - up * (bottom - top)

    draw.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    for share in (0, 0.5, 1):
        value = y0 + share * (y1 - y0)
        draw.text((4, bottom - share * (bottom - top) - 6), f"{10**value if logarithmic else value:.2g}", fill="black")
        draw.text((left + share * (right - left) - 8, bottom + 5), f"{x0 + share * (x1 - x0):.3g}", fill="black")
    draw.text(((left + right) / 2 - 20, bottom + 20), x_label, fill="black")
    draw.text((left + 6, 0), y_label + (" (logarithmic)" if logarithmic else ""), fill="black")
    for i, (name, (x_values, y_values)) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [place(x, y) for x, y in zip(x_values, y_values)]
        draw.line(points, fill=colour, width=2)
        for x, y in points if len(points) < 20 else []:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((right - 150, top + 14 * i), name, fill=colour)
    return chart
