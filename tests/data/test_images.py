"""Photographs and folders of images."""

import numpy as np
import pytest
from PIL import Image

from brecq_jax.data import center_crop, folder, images, mirrored, photographs
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


def test_no_image_that_judges_is_learned_from_in_a_mirror():
    originals = np.random.default_rng(0).integers(0, 255, (32, 4, 6, 3), np.uint8)
    both = mirrored(originals)
    assert len(both) == 64 and np.any(both[8] != both[0])
    np.testing.assert_array_equal(both[8:16], both[:8, :, ::-1])
    train, judge = split(len(both))
    learned = {both[i].tobytes() for i in train} | {both[i][:, ::-1].tobytes() for i in train}
    assert not learned & {both[i].tobytes() for i in judge}


def make(root, *names, colour=None):
    for n, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), colour or (n, 2 * n, 3 * n)).save(root / name)


LAYOUTS = {
    "numbers": (["000_n01440764_tench.png", "001_a.png", "207_golden.png"], [0, 1, 207]),
    "classes": (["cat/a.png", "cat/b.png", "dog/a.png"], [0, 0, 1]),
    "classes, numbered files": (["cat/0009_a.png", "cat/0010_a.png", "dog/0001_a.png"], [0, 0, 1]),
    "classes, deeper": (["cat/kittens/a.png", "dog/a.png"], [0, 1]),
    "numbers in one folder": (["val/3_a.png", "val/4_a.png"], [3, 4]),
    "neither": (["a.png", "b.png"], None),
    "one folder": (["cat/a.png"], None),
    "images beside folders": (["a.png", "cat/b.png", "dog/b.png"], None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_give_labels(layout, tmp_path):
    names, want = LAYOUTS[layout]
    make(tmp_path, *names)
    pixels, labels = folder(tmp_path, 8)
    assert (pixels.shape, pixels.dtype) == ((len(names), 8, 8, 3), np.uint8)
    assert pixels[:, 0, 0].tolist() == [[n, 2 * n, 3 * n] for n in range(len(names))]
    assert (labels if labels is None else labels.tolist()) == want


def test_a_limit_and_an_empty_class_change_no_label(tmp_path):
    make(tmp_path, *[f"{kind}/{n}.png" for kind in "abcd" for n in range(2)])
    (tmp_path / "aa").mkdir()
    pixels, labels = folder(tmp_path, 8, limit=3)
    assert labels.tolist() == [0, 2, 3]
    assert pixels[:, 0, 0, 0].tolist() == [0, 2, 5]
    assert folder(tmp_path, 8, limit=99)[1].tolist() == [0, 0, 2, 2, 3, 3, 4, 4]


def test_formats_and_modes_become_rgb_and_others_are_passed_over(tmp_path):
    for name, mode in (("a.JPG", "L"), ("b.png", "RGBA"), ("c.bmp", "RGB"), ("d.webp", "RGB"), ("e.png", "P"), ("f.jpeg", "CMYK")):
        Image.new(mode, (9, 9)).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("x")
    (tmp_path / "._a.jpg").write_bytes(b"not an image")
    make(tmp_path, ".thumbnails/a.png")
    assert folder(tmp_path, 8)[0].shape == (6, 8, 8, 3)


def test_a_transform_replaces_the_centre_crop(tmp_path):
    make(tmp_path, "a.png", colour=(255, 0, 0))
    pixels, _ = folder(tmp_path, 8, transform=lambda image: np.asarray(image.resize((8, 8))) / 255)
    assert np.all(pixels == (1.0, 0, 0))
    with pytest.raises(ValueError, match=r"transform made \[10, 12, 3\] of .*a\.png. Return \[8, 8, 3\]"):
        folder(tmp_path, 8, transform=np.asarray)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        folder(tmp_path, 8)
    with pytest.raises(ValueError, match="is no folder"):
        folder(tmp_path / "nowhere", 8)
    make(tmp_path, "a.png")
    with pytest.raises(ValueError, match="fraction=0"):
        folder(tmp_path, 8, fraction=0)
    with pytest.raises(ValueError, match="limit=0"):
        folder(tmp_path, 8, limit=0)


@pytest.mark.parametrize("content", [b"not an image", b"", "truncated"])
def test_an_unreadable_file_is_named(tmp_path, content):
    make(tmp_path, "a.png", "sub/b.png")
    draw = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(draw).save(tmp_path / "sub/b.png")
    path = tmp_path / "sub/b.png"
    path.write_bytes(path.read_bytes()[:2000] if content == "truncated" else content)
    with pytest.raises(ValueError, match=r"sub/b\.png cannot be read as an image.*Repair or remove it"):
        folder(tmp_path, 8)
