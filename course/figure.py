"""Remakes docs/course.png: what the thirteen exercises end in, made by the project's own functions."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from checks import Course

ROOT = Path(__file__).resolve().parent.parent
WIDTH, GAP = 520, 14


def main():
    """Three columns; each exercise goes under the column that is shortest so far."""
    torch.set_num_threads(1)
    course, columns = Course(ROOT), [[], [], []]
    heights = [GAP] * 3
    for number in range(1, 14):
        exercise = course.exercise(number)
        picture = exercise.show(course.reference)[0].convert("RGB")
        picture.thumbnail((WIDTH, 500), Image.Resampling.LANCZOS)
        k = heights.index(min(heights))
        columns[k].append((f"{number}  {exercise.TITLE}", picture, heights[k]))
        heights[k] += picture.height + 18 + GAP
    sheet = Image.new("RGB", (3 * (WIDTH + GAP) + GAP, max(heights)), "white")
    for k, column in enumerate(columns):
        for title, picture, y in column:
            x = GAP + k * (WIDTH + GAP)
            ImageDraw.Draw(sheet).text((x, y), title, fill="black", font_size=13)
            sheet.paste(picture, (x, y + 18))
    path = ROOT / "docs" / "course.png"
    sheet.quantize(128).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
