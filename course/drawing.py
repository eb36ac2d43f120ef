"""Line charts and sheets for the exercises' pictures, with Pillow alone."""

import math

from PIL import Image, ImageDraw

COLOURS = ["#c03030", "#2060c0", "#208040", "#808080", "#c08020", "#8030a0"]


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


def stack(*pictures):
    """PIL pictures, one below the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    y = 0
    for each in pictures:
        sheet.paste(each, (0, y))
        y += each.height
    return sheet


def twice(picture):
    """A PIL picture at twice its size, each pixel four."""
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
