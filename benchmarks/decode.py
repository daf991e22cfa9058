r"""Photographs to batches: images a second against a plain loop, what a JPEG decoded small changes, and what a calibration set takes.

    taskset -c 1 python benchmarks/decode.py --data=imagenet_sample

The plain loop is what one writes: open, convert, resize the short side to 256, cut the central 224. `stream` gives the same pixels
(a crop's box is resized alone). Rounds alternate, and medians are printed. Memory is that of a process of its own.
"""

import argparse
import dataclasses
import functools
import io
import math
import pathlib
import re
import statistics
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from brecq_jax import data
from brecq_jax.data import images as crops

SIZE, SHORT, BATCH = 224, 256, 100
CROP = functools.partial(data.center_crop, size=SIZE, fraction=SIZE / SHORT, interpolation="bilinear")
CALIBRATION = 1024
MB = 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of images")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="what the calibration set takes, alone")
    known = parser.parse_args()
    images = data.image_folder(known.data)
    if known.memory:
        return print_memory(images)
    print_rates(images.spread(known.count), known.rounds)
    print_draft()
    subprocess.run([sys.executable, __file__, f"--data={known.data}", "--memory"], check=True)


def plain(images: data.Images) -> np.ndarray:
    batch = []
    for row in images.rows:
        image = images.open(row)[0].convert("RGB")
        width, height = (SHORT * side // min(image.size) for side in image.size)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        whole = image.resize((width, height), Image.Resampling.BILINEAR)
        batch.append(np.asarray(whole.crop((left, top, left + SIZE, top + SIZE))))
    return np.stack(batch)


def streamed(images: data.Images) -> np.ndarray:
    return np.concatenate([pixels for pixels, _ in data.stream(images, CROP, BATCH)])


def calibration(images: data.Images) -> np.ndarray:
    return data.calibration_crops(images, len(images), SIZE, seed=0)


def print_rates(images: data.Images, rounds: int):
    ways = {"plain loop": plain, "stream": streamed, "calibration_crops": calibration}
    seconds = {name: [] for name in ways}
    difference = np.abs(plain(images).astype(int) - streamed(images))  # also fills the page cache
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(images)
            seconds[name].append(time.perf_counter() - start)
    print(f"{len(images)} images, medians of {rounds}; stream and plain loop differ by {difference.mean():.3f} of 255 on average\n")
    print("| | images a second | over the plain loop |\n|---|---|---|")
    base = statistics.median(seconds["plain loop"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"| {name} | {len(images) / median:.0f} ({len(images) / max(taken):.0f} to {len(images) / min(taken):.0f}) | {base / median:.2f} |")


def print_draft():
    """Mean difference from a full decode, and milliseconds, of photographs enlarged to a phone's."""
    print("\n| short side | pixels spared for one | mean difference of 255 | ms |\n|---|---|---|---|")
    for short in (512, 1024, 2048):
        files = []
        for name in crops.CALIBRATION:
            image = Image.open(crops._in_package(name)).convert("RGB")
            buffer = io.BytesIO()
            image.resize([short * side // min(image.size) for side in image.size], Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=92)
            files.append(buffer)
        full = None
        for spare in (math.inf, 2, 1):
            crops.SPARE = min(spare, short)  # beyond the image's own size nothing is decoded small
            start = time.perf_counter()
            pixels = np.stack([CROP(Image.open(file)) for file in files]).astype(int)
            taken = 1e3 * (time.perf_counter() - start) / len(files)
            full = pixels if full is None else full
            print(f"| {short} | {spare} | {np.abs(pixels - full).mean():.2f} | {taken:.0f} |")


def print_memory(images: data.Images):
    rows = [images.rows[i % len(images)] for i in range(CALIBRATION)]
    before = peak_bytes()
    pixels = data.calibration_crops(dataclasses.replace(images, rows=rows), CALIBRATION, SIZE, seed=0)
    examples = data.materialize(pixels)
    peak = peak_bytes() - before
    print(f"\n{examples.count} calibration images hold {pixels.nbytes / MB:.0f} MB; the process grew by at most {peak / MB:.0f} MB")
    print(f"({peak / pixels.nbytes:.2f} times that; in float32 they would hold {4 * pixels.nbytes / MB:.0f} MB)")


def peak_bytes() -> int:
    """The most that this process has held. (Linux; getrusage's figure would begin with that of the process that started it.)"""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    main()
