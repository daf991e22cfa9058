"""Folders of images and tfds sets, read at once and in a stream."""

import functools
import io
import json
import pathlib
import sys
import threading

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from brecq_jax.data import calibration_crops, center_crop, folder, image_folder, open_images, sources, stream, tfds_images
from brecq_jax.data.sources import Images

CROP = functools.partial(center_crop, size=8, fraction=1.0)


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


@pytest.mark.parametrize("batch_size", [1, 3, 4, 99])
def test_a_stream_is_the_folder_in_batches(batch_size, tmp_path):
    make(tmp_path, *[f"{kind}/{n}.png" for kind in "ab" for n in range(2)])
    pixels, labels = folder(tmp_path, 8)
    batches = list(stream(image_folder(tmp_path), CROP, batch_size))
    assert [len(p) for p, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate([p for p, _ in batches]), pixels)
    np.testing.assert_array_equal(np.concatenate([n for _, n in batches]), labels)


def counted(count: int) -> tuple[Images, list[int]]:
    """Images, and the rows that were opened so far."""
    opened, lock = [], threading.Lock()

    def open_row(row: int):
        with lock:
            opened.append(row)
        return Image.new("RGB", (8, 8), (row, 0, 0)), row

    return Images(range(count), open_row, str), opened


def test_a_stream_decodes_ahead_and_no_further():
    images, opened = counted(100)
    batches = stream(images, CROP, 5)
    assert not opened
    _, labels = next(batches)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    deadline = threading.Event()
    while len(opened) < 14 and not deadline.wait(0.01):
        pass
    deadline.wait(0.1)
    assert len(opened) <= 5 + 2 * 5
    batches.close()
    assert len(opened) <= 5 + 2 * 5


def test_a_stream_without_labels_says_so(tmp_path):
    make(tmp_path, "a.png", "b.png")
    assert [labels for _, labels in stream(image_folder(tmp_path), CROP, 1)] == [None, None]


def test_a_stream_names_what_cannot_be_read(tmp_path):
    make(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    batches = stream(image_folder(tmp_path), CROP, 1)
    next(batches)
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image"):
        next(batches)
    with pytest.raises(ValueError, match="batch_size=0"):
        stream(image_folder(tmp_path), CROP, 0)


def test_calibration_crops_depend_on_the_seed_alone():
    images, _ = counted(40)
    crops = calibration_crops(images, 20, 8, seed=3)
    assert (crops.shape, crops.dtype) == ((20, 8, 8, 3), np.uint8)
    assert len(set(crops[:, 0, 0, 0].tolist())) == 20
    np.testing.assert_array_equal(calibration_crops(images, 20, 8, seed=3), crops)
    np.testing.assert_array_equal(calibration_crops(images, 5, 8, seed=3), crops[:5])
    assert np.any(calibration_crops(images, 20, 8, seed=4) != crops)
    for count in (0, 41):
        with pytest.raises(ValueError, match=f"{count} calibration images of 40: write 1 to 40"):
            calibration_crops(images, count, 8, seed=0)


def test_a_folder_calibrates_and_scores(tmp_path):
    make(tmp_path / "one", *[f"{n}_x.png" for n in range(5)])
    calibration, scored = open_images(tmp_path / "one")
    assert [calibration.open(r)[1] for r in calibration.rows] == [0, 2, 4]
    assert [scored.open(r)[1] for r in scored.rows] == [1, 3]
    make(tmp_path / "alone", "a.png")
    with pytest.raises(ValueError, match="alone holds one image"):
        open_images(tmp_path / "alone")
    make(tmp_path / "two", "train/cat/a.png", "train/dog/a.png", "val/cat/b.png", "val/cat/c.png", "val/dog/b.png")
    calibration, scored = open_images(str(tmp_path / "two"))
    assert (len(calibration), len(scored)) == (2, 3)
    assert [scored.open(r)[1] for r in scored.rows] == [0, 0, 1]


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30 + number, 20), (9 * number, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


class Snapshots(tfds.core.GeneratorBasedBuilder):
    """A local set of JPEG files: no TensorFlow anywhere."""

    # tfds 4.9.10 looks for the code of a dotted module with importlib_resources, which it does not require.
    __module__ = "made_in_a_test"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=12)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 12), "test": self._generate_examples(0, 7)}

    def _generate_examples(self, first, last):
        for i in range(first, last):
            yield i, {"image": io.BytesIO(encoded(i)), "label": i}


@pytest.fixture
def snapshots(tmp_path):
    Snapshots(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    return tmp_path


def test_a_local_tfds_set_calibrates_and_scores(snapshots):
    calibration, scored = open_images(snapshots, "snapshots")
    assert (len(calibration), len(scored)) == (12, 7)
    crops = calibration_crops(calibration, 12, 8, seed=0)
    assert sorted(round(int(r) / 9) for r in crops[:, 0, 0, 0]) == list(range(12))
    batches = list(stream(scored, CROP, 4))
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert sorted(labels) == list(range(7))
    np.testing.assert_allclose(pixels[:, 0, 0, 0], 9 * labels, atol=2)
    assert "tensorflow" not in sys.modules


def test_every_process_scores_its_share_and_all_calibrate_on_the_same(snapshots, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    scored, crops = [], []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        calibration, share = open_images(snapshots, "snapshots")
        crops.append(calibration_crops(calibration, 6, 8, seed=0))
        scored.append([label for _, labels in stream(share, CROP, 4) for label in labels])
    assert {len(share) for share in scored} == {3, 4}
    assert sorted(scored[0] + scored[1]) == list(range(7))
    np.testing.assert_array_equal(*crops)


@pytest.mark.parametrize(("path", "data_dir"), [("", None), (pathlib.Path(""), None), (".", "."), (pathlib.Path("a"), "a")])
def test_no_path_is_the_own_folder_of_tfds(path, data_dir, monkeypatch):
    monkeypatch.setattr(sources, "_tfds_splits", lambda dataset, data_dir: (dataset, data_dir))
    assert open_images(path, "snapshots") == ("snapshots", data_dir)


def test_a_set_that_was_not_prepared_is_said_to_be_so(tmp_path):
    told = r"snapshots in .* is not prepared.*file_format='array_record'.*imagenet2012.*pip install tensorflow-cpu importlib_resources"
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path, "snapshots")


def test_without_tfds_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorflow-datasets array_record"):
        open_images("", "snapshots")


def test_images_say_of_how_many_classes_their_labels_are(tmp_path, snapshots):
    for names, classes in ((["a/1.png", "b/2.png"], 2), (["0_a.png", "7_b.png"], None), (["a.png", "b.png"], 0)):
        make(tmp_path / str(classes), *names)
        assert image_folder(tmp_path / str(classes)).spread(1)[:1].classes == classes
    assert open_images(snapshots, "snapshots")[1].classes == 12


def test_a_set_in_another_file_format_is_refused_with_the_way_out(snapshots):
    (path,) = snapshots.rglob("dataset_info.json")
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"snapshots in .* cannot be read at random.*file_format='array_record'"):
        open_images(snapshots, "snapshots")


def test_mocked_imagenet_is_read():
    def data_source(self, split, decoders, **_):
        assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
        return [{"image": encoded(i), "label": np.int64(i), "file_name": b""} for i in range(5 if split == "train" else 4)]

    with tfds.testing.mock_data(num_examples=5, as_data_source_fn=data_source):
        calibration, scored = open_images("", "imagenet2012")
    assert calibration_crops(calibration, 5, 224, seed=0).shape == (5, 224, 224, 3)
    assert [labels.tolist() for _, labels in stream(scored, CROP, 3)] == [[0, 1, 2], [3]]


@pytest.mark.parametrize("name", ["imagenet2012", "mnist"])
def test_decoded_examples_are_read(name):
    with tfds.testing.mock_data(num_examples=5):
        source = tfds.data_source(name, split="train")
        images = tfds_images(source)
    ((pixels, labels),) = stream(images, CROP, 5)
    assert (pixels.shape, pixels.dtype) == ((5, 8, 8, 3), np.uint8)
    assert labels.tolist() == [source[i]["label"] for i in range(5)]


def test_a_source_without_images_is_refused():
    with pytest.raises(ValueError, match=r"example 0 has \['x'\], no \"image\""):
        list(stream(tfds_images([{"x": 1}]), CROP, 1))
