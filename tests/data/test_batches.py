"""Every kind of calibration set gives the same examples, and bad ones are refused with the way out."""

import itertools
import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from brecq_jax.data import Examples, materialize

IMAGES = np.arange(12 * 4 * 4 * 3, dtype=np.uint8).reshape(12, 4, 4, 3)
BATCHES = [IMAGES[:5], IMAGES[5:10], IMAGES[10:]]  # the last is smaller


class LikeTensorFlow:
    """What of tf.data.Dataset is used."""

    def as_numpy_iterator(self):
        return iter([{"image": b, "label": np.zeros(len(b))} for b in BATCHES])


class LikeTfds:
    """A tfds data source, told by one attribute; its examples have a part that cannot be stacked."""

    dataset_info = None

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {"image": IMAGES[i], "label": np.int64(i), "name": b"x", "boxes": np.zeros((i, 4))}


class Single:
    """Single examples for grain."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {"image": IMAGES[i], "label": i}


def grain_loader():
    sampler = grain.samplers.IndexSampler(12, shard_options=grain.sharding.NoSharding(), shuffle=False, num_epochs=1)
    return grain.DataLoader(data_source=Single(), sampler=sampler, operations=[grain.transforms.Batch(5)])


KINDS = {
    "array": lambda: IMAGES,
    "jax array": lambda: jnp.asarray(IMAGES),
    "dict of arrays": lambda: {"image": IMAGES, "label": np.zeros(12)},
    "list of arrays": lambda: BATCHES,
    "list of jax arrays": lambda: list(map(jnp.asarray, BATCHES)),
    "list of one": lambda: [(IMAGES, np.zeros(12))],
    "list of tuples": lambda: [(b, np.zeros(len(b))) for b in BATCHES],
    "list of image dicts": lambda: [{"image": b, "label": np.zeros(len(b))} for b in BATCHES],
    "list of inputs dicts": lambda: [{"inputs": b} for b in BATCHES],
    "list of x dicts": lambda: [{"x": b, "y": b} for b in BATCHES],
    "function of a generator": lambda: lambda: (b for b in BATCHES),
    "function of a list": lambda: lambda: BATCHES,
    "function of an array": lambda: lambda: IMAGES,
    "function of tf.data": lambda: lambda: LikeTensorFlow(),
    "generator": lambda: (b for b in BATCHES),
    "iterator": lambda: iter(BATCHES),
    "tf.data": LikeTensorFlow,
    "tfds": LikeTfds,
    "grain MapDataset": lambda: grain.MapDataset.source(Single()).batch(5),
    "grain IterDataset": lambda: grain.MapDataset.source(Single()).to_iter_dataset().batch(5),
    "grain DataLoader": grain_loader,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_set_gives_the_same_examples(kind):
    examples = materialize(KINDS[kind]())
    assert type(examples.arrays) is np.ndarray
    assert examples.arrays.dtype == np.uint8
    assert examples.count == 12
    np.testing.assert_array_equal(examples.arrays, IMAGES)


def test_tfds_mock_data_is_read():
    with tfds.testing.mock_data(num_examples=5):
        source = tfds.data_source("mnist", split="train")
        want = np.stack([source[i]["image"] for i in range(5)])
    examples = materialize(source)
    assert (examples.count, examples.arrays.shape, examples.arrays.dtype) == (5, (5, 28, 28, 1), np.uint8)
    np.testing.assert_array_equal(examples.arrays, want)


class TinyCalib(tfds.core.GeneratorBasedBuilder):
    """A local set in array_record format: no TensorFlow anywhere."""

    # tfds 4.9.10 looks for the code of a dotted module with importlib_resources, which it does not require.
    __module__ = "made_in_a_test"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"x": tfds.features.Tensor(shape=(4,), dtype=np.float32), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(9):
            yield i, {"x": np.full(4, i, np.float32), "label": i % 3}


def test_a_local_tfds_set_is_read(tmp_path):
    builder = TinyCalib(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    examples = materialize(builder.as_data_source("train"))
    assert sorted(examples.arrays[:, 0]) == list(range(9))
    assert examples.arrays.dtype == np.float32
    labels = materialize(builder.as_data_source("train"), inputs="label").arrays
    np.testing.assert_array_equal(labels, examples.arrays[:, 0] % 3)
    with pytest.raises(TypeError, match=r"dict of data sets, \['train'\]. Pass one of them, as calib_ds\['train'\]"):
        materialize(builder.as_data_source())


TOKENS = [{"ids": np.full((2, 3), n), "mask": np.ones((2, 3), bool)} for n in range(3)]


def test_inputs_choose_a_part():
    assert materialize(TOKENS, inputs="ids").arrays.tolist() == [[n] * 3 for n in (0, 0, 1, 1, 2, 2)]
    assert materialize([(0, "name", IMAGES)], inputs=2).arrays.shape == IMAGES.shape
    assert materialize([(IMAGES, IMAGES[:, 0])], inputs=1).arrays.shape == (12, 4, 3)
    assert materialize(BATCHES, inputs=lambda e: e[..., :1] / 255).arrays.shape == (12, 4, 4, 1)
    assert materialize(LikeTfds(), inputs=lambda e: e["image"][:2]).arrays.shape == (12, 2, 4, 3)


def test_an_input_may_be_a_tree():
    examples = materialize(TOKENS, inputs=lambda e: e)
    assert examples.count == 6
    assert jax.tree.map(lambda a: (a.shape, a.dtype.name), examples.arrays) == {"ids": ((6, 3), "int64"), "mask": ((6, 3), "bool")}
    assert [b["ids"].tolist() for b in examples.batches(4)] == [[[0] * 3, [0] * 3, [1] * 3, [1] * 3], [[2] * 3, [2] * 3]]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 99])
def test_batches_are_the_examples_in_order(batch_size):
    batches = list(Examples(IMAGES, 12).batches(batch_size))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)


def test_no_batch_of_nothing():
    with pytest.raises(ValueError, match="write at least 1"):
        Examples(IMAGES, 12).batches(0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "bool"])
def test_dtypes_stay(dtype):
    batch = np.zeros((2, 3), jnp.dtype(dtype))
    assert materialize([batch, batch]).arrays.dtype == batch.dtype


NAN = np.zeros((2, 3), np.float32)
NAN[1, 2] = np.nan
GIVEN_UP = iter(BATCHES)
list(GIVEN_UP)

BAD = {
    "empty list": ([], ValueError, "calib_ds is empty"),
    "iterator that was read before": (GIVEN_UP, ValueError, "read before is empty"),
    "no examples": (np.zeros((0, 3)), ValueError, "hold 0 examples on axis 0. Pass at least one"),
    "nan": ([NAN[:1], NAN], ValueError, "example 1 of batch 1 has values that are not finite"),
    "inf in bfloat16": (jnp.full((2, 3), jnp.inf, jnp.bfloat16), ValueError, "example 0 of batch 0 has values"),
    "shapes": ([np.zeros((2, 3)), np.zeros((2, 4))], ValueError, r"batch 1 has examples of float64\[4\], batch 0 of float64\[3\]"),
    "dtypes": ([np.zeros((2, 3)), np.zeros((2, 3), int)], ValueError, r"batch 1 has examples of int64\[3\], batch 0 of float64\[3\]"),
    "trees": ([{"x": {"a": IMAGES}}, {"x": {"b": IMAGES}}], ValueError, "batch 1 is {'b': array}, batch 0 is {'a': array}"),
    "counts": ([{"x": (IMAGES, IMAGES[:5])}], ValueError, r"arrays of batch 0 hold \[5, 12\] examples"),
    "no arrays": ([{"x": {}}], ValueError, "batch 0 holds no arrays"),
    "objects": ([np.array([None, {}])], TypeError, "batch 0 holds object values. Pass numbers"),
    "strings in an array": ([np.array(["a", "b"])], TypeError, "Pass numbers"),
    "list of strings": (["a.png", "b.png"], TypeError, "Pass numbers"),
    "complex": (np.zeros((2, 3), complex), TypeError, "holds complex128 values"),
    "random keys": ([{"x": (IMAGES, jax.random.split(jax.random.key(0), 12))}], TypeError, "let apply_fn draw with a key of its own"),
    "string": ("folder/", TypeError, "is a str, which holds no batches"),
    "number": (3, TypeError, "is a int, which holds no batches"),
    "none": (None, TypeError, "is a NoneType, which holds no batches"),
    "list of numbers": ([0.5, 1.5], ValueError, "single number"),
    "scalar array": (np.float32(1), ValueError, "single number"),
    "list of lists": ([[0.5, 1.5]], TypeError, "make it an array"),
    "tuple": ((IMAGES, np.zeros(12)), TypeError, r"\[\(x, y\)\] for one batch"),
    "keys": ([{"pixels": IMAGES, "y": IMAGES}], TypeError, r"a dict with \['pixels', 'y'\]. Say what the model takes: inputs='KEY'"),
    "triple": ([(IMAGES, IMAGES, IMAGES)], TypeError, "a tuple of 3. Say what the model takes: inputs=0"),
    "unbatched grain": (grain.MapDataset.source(Single()), ValueError, r"batch 0 has a single number beside the input.*\.batch\(32\)"),
    "unbatched list": ([(IMAGES[0], 3)], ValueError, "as one example has"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sets_are_refused_with_the_way_out(kind):
    calib_ds, error, words = BAD[kind]
    with pytest.raises(error, match=words):
        materialize(calib_ds)


def test_a_bad_example_of_a_data_source_is_named():
    class Ragged(LikeTfds):
        def __getitem__(self, i):
            return {"image": np.zeros((4 + (i == 7), 4))}

    class Broken(LikeTfds):
        def __getitem__(self, i):
            return {"image": np.full(3, np.nan if i == 7 else 0)}

    with pytest.raises(ValueError, match=r"example 7 has examples of float64\[5, 4\], example 0 of float64\[4, 4\].*Resize or pad"):
        materialize(Ragged())
    with pytest.raises(ValueError, match="calib_ds: example 7 has values that are not finite"):
        materialize(Broken())


@pytest.mark.parametrize("inputs", ["pixels", 3])
def test_a_missing_part_is_named(inputs):
    with pytest.raises(TypeError, match=re.escape(f"inputs={inputs!r}: batch 0 has no such part. It is a dict with ['image']")):
        materialize([{"image": IMAGES}], inputs=inputs)
    with pytest.raises(TypeError, match="no such part. It is a tuple"):
        materialize([(IMAGES, IMAGES)], inputs="pixels" if inputs == "pixels" else 3)


def test_too_few_examples_are_refused():
    assert materialize(BATCHES, min_examples=12).count == 12
    with pytest.raises(ValueError, match="hold 12 examples on axis 0. Pass at least 13"):
        materialize(BATCHES, min_examples=13)


def test_an_impossible_count_is_refused():
    with pytest.raises(ValueError, match="min_examples=-1"):
        materialize(BATCHES, min_examples=-1)


SIX = np.zeros((6, 1000), np.uint8)


@pytest.mark.parametrize(
    ("calib_ds", "words"),
    [
        (SIX, "6 examples take 6e-06 GB.*need 6e-06 GB. Pass at most 5 examples"),
        ([SIX[:3]] * 4, r"6 examples take 6e-06 GB, over memory_budget_gb=5.9e-06; all of them \(about 12\) need 1.2e-05 GB"),
        ((SIX[:3] for _ in itertools.count()), r"all of them \(more than that many\) need at least 6e-06 GB"),
        ([np.zeros((1, 9000), np.uint8)], "Pass smaller examples"),
    ],
    ids=["array", "list", "endless generator", "one large example"],
)
def test_a_set_over_the_budget_is_refused_with_what_it_needs(calib_ds, words):
    with pytest.raises(ValueError, match=words):
        materialize(calib_ds, budget_gb=5.9e-6)
