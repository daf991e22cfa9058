"""Calibration examples out of whatever a user has."""

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from brecq_jax import data

IMAGES = np.random.default_rng(0).random((12, 4, 4, 3)).astype(np.float32)
BATCHES = np.split(IMAGES, 3)


class LikeTensorFlow:
    def as_numpy_iterator(self):
        return iter(BATCHES)


class Counted:
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {"image": IMAGES[i], "label": i}


KINDS = {
    "array": lambda: IMAGES,
    "list of batches": lambda: BATCHES,
    "tuples with labels": lambda: [(b, np.zeros(4)) for b in BATCHES],
    "dicts with images": lambda: [{"image": b, "label": np.zeros(4)} for b in BATCHES],
    "function": lambda: lambda: iter(BATCHES),
    "generator": lambda: (b for b in BATCHES),
    "tf.data": LikeTensorFlow,
    "grain dataset": lambda: grain.MapDataset.source(Counted()).batch(4),
    "grain loader": lambda: grain.DataLoader(
        data_source=Counted(),
        sampler=grain.samplers.IndexSampler(12, shard_options=grain.sharding.NoSharding(), shuffle=False, num_epochs=1),
        operations=[grain.transforms.Batch(4)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_set_gives_the_same_examples(kind):
    examples = data.materialize(KINDS[kind]())
    assert examples.count == 12
    np.testing.assert_array_equal(examples.arrays, IMAGES)


def test_inputs_choose_a_part():
    batches = [{"ids": np.ones((2, 3), int), "mask": np.ones((2, 3), bool)}]
    assert data.materialize(batches, inputs="ids").arrays.shape == (2, 3)
    assert set(data.materialize(batches, inputs=lambda b: b).arrays) == {"ids", "mask"}
    assert data.materialize([(np.zeros((2, 1)), IMAGES[:2], 0)], inputs=1).arrays.shape == (2, 4, 4, 3)


def test_tfds_data_sources_are_read_without_tensorflow():
    with tfds.testing.mock_data(num_examples=5):
        source = tfds.data_source("mnist", split="train")
    assert data.materialize(source).arrays.shape == (5, 28, 28, 1)


@pytest.mark.parametrize(
    ("calib_ds", "error", "words"),
    [
        ([], ValueError, "empty"),
        (np.zeros((0, 3)), ValueError, "at least one"),
        ([np.full((2, 3), np.nan)], ValueError, "example 0 of batch 0 has values that are not finite"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], ValueError, "batch 1 has examples of"),
        ([np.zeros((2, 3)), np.zeros((2, 3), int)], ValueError, "batch 1 has examples of"),
        ([np.array(["a", "b"])], TypeError, "Pass numbers"),
        ("folder/", TypeError, "holds no batches"),
        (3, TypeError, "holds no batches"),
        ([{"pixels": np.zeros((2, 3))}], TypeError, "inputs='KEY'"),
        ([(np.zeros(2), 1, 2)], TypeError, "inputs=0"),
        ([np.float32(1)], ValueError, "single number"),
    ],
)
def test_bad_sets_are_refused_with_the_way_out(calib_ds, error, words):
    with pytest.raises(error, match=words):
        data.materialize(calib_ds)


def test_a_set_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="memory_budget_gb"):
        data.materialize((b for b in BATCHES), budget_gb=1e-6)


def test_a_missing_part_is_named():
    with pytest.raises(TypeError, match="no such part"):
        data.materialize([{"image": IMAGES}], inputs="pixels")


def test_photographs_are_deterministic_and_their_splits_disjoint():
    one, two = (data.photographs(32, 8, 0, "calibration") for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (8, 32, 32, 3)
    assert one.dtype == np.uint8
    assert not set(data.images.CALIBRATION) & set(data.images.EVALUATION)
    assert all(map(data.images._in_package, data.images.CALIBRATION + data.images.EVALUATION))
    assert np.any(data.photographs(32, 8, 1, "calibration") != one)


def test_folders_give_images_and_labels(tmp_path):
    for name in ("003_a.png", "001_b.png"):
        Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / name)
    images, labels = data.folder(tmp_path, 16)
    assert images.shape == (2, 16, 16, 3)
    assert labels.tolist() == [1, 3]
    for kind in ("cat", "dog"):
        (tmp_path / "classes" / kind).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "classes" / kind / "x.png")
    assert data.folder(tmp_path / "classes", 8)[1].tolist() == [0, 1]


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        data.folder(tmp_path, 8)
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        data.folder(tmp_path, 8)
