"""Crops, mirror images, and the photographs that wheels ship."""

import numpy as np
import pytest
from PIL import Image

from brecq_jax.data import center_crop, images, mirrored, photographs, random_crop
from brecq_jax.solvers._solver import split


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_photographs_are_the_same_for_the_same_seed(split):
    one, two = (photographs(24, 9, 7, split) for _ in range(2))
    assert (one.shape, one.dtype) == ((9, 24, 24, 3), np.uint8)
    np.testing.assert_array_equal(one, two)
    assert np.any(photographs(24, 9, 8, split) != one)
    np.testing.assert_array_equal(photographs(24, 4, 7, split), one[:4])
    assert all(crop.std() > 1 for crop in one)


def test_the_splits_share_no_photograph():
    assert not set(images.CALIBRATION) & set(images.EVALUATION)
    assert np.any(photographs(24, 4, 0, "calibration") != photographs(24, 4, 0, "evaluation"))


def test_photographs_are_on_disk():
    assert all(map(images._in_package, images.CALIBRATION + images.EVALUATION))


def test_a_missing_photograph_is_named(monkeypatch):
    monkeypatch.setitem(images.SPLITS, "calibration", ("skimage/data/astronaut.png", "no_such_package/a.png"))
    with pytest.raises(ModuleNotFoundError, match=r"no no_such_package/a\.png here. pip install"):
        photographs(8, 1, 0, "calibration")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((8, 1, 0, "train"), "split='train': write one of"), ((0, 1, 0, "calibration"), "size=0"), ((8, 0, 0, "calibration"), "count=0")],
)
def test_bad_requests_for_photographs_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        photographs(*arguments)


def test_the_centre_of_an_image_is_its_centre():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[5:15, 15:25] = (10, 20, 30)
    assert np.all(center_crop(Image.fromarray(pixels), 10, 0.5) == (10, 20, 30))
    assert np.all(center_crop(Image.fromarray(pixels), 20, 1.0) == pixels[:, 10:30])


@pytest.mark.parametrize(("count", "exceptions"), [(32, 0), (35, 0), (36, 1), (39, 1)])
def test_no_image_that_judges_is_learned_from_in_a_mirror(count, exceptions):
    originals = np.random.default_rng(0).integers(0, 255, (count, 4, 6, 3), np.uint8)
    both = mirrored(originals)
    assert len(both) == 2 * count and np.any(both[8] != both[0])
    np.testing.assert_array_equal(both[8:16], both[:8, :, ::-1])
    train, judge = split(len(both))
    learned = {both[i].tobytes() for i in train} | {both[i][:, ::-1].tobytes() for i in train}
    assert len(learned & {both[i].tobytes() for i in judge}) == exceptions


def noise(width: int, height: int) -> Image.Image:
    """Colours that change from pixel to pixel, and slowly as well."""
    draw = np.random.default_rng(width)
    slow = Image.fromarray(draw.integers(0, 255, (5, 7, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(slow, Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8)), 0.2)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sides", [(500, 375), (333, 500), (300, 300), (211, 97)])
def test_the_evaluation_crop_is_short_side_256_and_the_central_224(sides, interpolation):
    image = noise(*sides)
    short = min(sides)
    whole = image.resize(tuple(int(256 * side / short) for side in sides), images.FILTERS[interpolation])
    left, top = round((whole.width - 224) / 2), round((whole.height - 224) / 2)
    want = np.asarray(whole.crop((left, top, left + 224, top + 224)), int)
    difference = np.abs(center_crop(image, 224, 224 / 256, interpolation) - want)
    # Pillow resizes a portrait's columns or rows first as it sees fit, and rounds in between.
    assert difference.max() <= 4 and difference.mean() < 0.35


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    noise(1600, 1200).save(tmp_path / "a.jpg", quality=92)
    with Image.open(tmp_path / "a.jpg") as opened:
        small = center_crop(opened, 224, 224 / 256, "bilinear").astype(int)
        assert opened.size == (800, 600)
    with Image.open(tmp_path / "a.jpg") as opened:
        opened.load()
        whole = center_crop(opened, 224, 224 / 256, "bilinear")
    assert np.abs(small - whole).mean() < 0.5
    with Image.open(tmp_path / "a.jpg") as opened:
        center_crop(opened, 512, 1.0)
        assert opened.size == (1600, 1200)


def coordinates(width: int, height: int) -> Image.Image:
    """Every pixel says where it is, in 255ths of the side."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("sides", [(400, 300), (300, 400), (300, 300)])
def test_random_crops_keep_to_their_area_and_aspect(sides):
    image = coordinates(*sides)
    areas, aspects, mirrors = [], [], []
    for seed in range(200):
        crop = random_crop(image, 64, np.random.default_rng(seed)).astype(float)
        across, down = crop[..., 0].mean(0), crop[..., 1].mean(1)
        width, height = (np.ptp(side) / 255 * 64 / 63 for side in (across, down))
        areas.append(width * height)
        aspects.append(width * sides[0] / (height * sides[1]))
        mirrors.append(across[0] > across[-1])
    assert 0.05 < min(areas) < 0.15 and 0.8 < max(areas) < 1.05
    assert 0.65 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.5
    assert 70 < sum(mirrors) < 130


@pytest.mark.parametrize("sides", [(600, 40), (40, 600)])
def test_where_no_box_fits_the_middle_is_taken(sides, monkeypatch):
    monkeypatch.setattr(images, "AREA", (1.0, 1.0))
    image = coordinates(*sides)
    crop = random_crop(image, 32, np.random.default_rng(0)).astype(float)
    assert crop[..., 0].mean() == pytest.approx(127, abs=2) and crop[..., 1].mean() == pytest.approx(127, abs=2)
    share = 53 / 600  # 40 pixels by 4 / 3
    assert np.ptp(crop[..., int(sides[1] > sides[0])]) / 255 == pytest.approx(share, rel=0.1)


def test_the_same_draw_is_the_same_crop():
    image = noise(60, 50)
    one, two = (random_crop(image, 16, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.any(random_crop(image, 16, np.random.default_rng(4)) != one)


def test_another_interpolation_is_refused():
    with pytest.raises(ValueError, match="interpolation='nearest': write one of"):
        center_crop(noise(20, 20), 8, 1.0, "nearest")
    with pytest.raises(ValueError, match="interpolation='nearest': write one of"):
        random_crop(noise(20, 20), 8, np.random.default_rng(0), "nearest")
