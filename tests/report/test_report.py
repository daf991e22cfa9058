"""Records, tables, the picture and the page."""

import base64
import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from brecq_jax.report import ActivationRecord, BlockRecord, Report, TensorRecord, block_errors, write_html

HOSTILE = "<script>alert('x')</script> & [red]\"$_{x}"


def block(name="stage0/block0", before=0.3, after=0.1, kept=True, solver="rounding") -> BlockRecord:
    return BlockRecord(name, ("conv1", "conv2"), before, after, kept, 100, 1.25, solver)


def report(**changes) -> Report:
    fields = dict(
        blocks=(block(), block("head", 2e-5, 2e-5, kept=False)),
        tensors=(TensorRecord("conv1/kernel", (3, 3, 8, 8), "int4", 4.5, 2592, 18432), TensorRecord("bias", (), "float", 32.0, 32, 32, "a scalar")),
        activations=(ActivationRecord("conv1", "int8", 0.0, 0.1 + 0.2, False),),
        skipped=(("norm/scale", "fewer than two axes"),),
        plan="conv1/kernel  int4",
        wall_seconds=12.5,
        compiled_programs=2,
        notes=("one note",),
    )
    return Report(**{**fields, **changes})


REPORTS = {
    "full": report(),
    "empty": Report((), (), (), (), "", 0.0, 0, ()),
    "hostile": report(blocks=(block(HOSTILE),), notes=(HOSTILE,), plan=HOSTILE, skipped=((HOSTILE, HOSTILE),)),
    "tiny numbers": report(blocks=(block(before=5e-324, after=0.0),), wall_seconds=1 / 3),
}


@pytest.mark.parametrize("name", REPORTS)
def test_json_gives_the_same_report_back(name):
    plain = REPORTS[name].to_json()
    assert Report.from_json(plain) == REPORTS[name]
    assert Report.from_json(json.dumps(plain)) == REPORTS[name]
    assert type(plain) is dict


def test_reports_saved_before_tensors_had_notes_are_read():
    plain = report().to_json()
    for tensor in plain["tensors"]:
        del tensor["note"]
    assert [t.note for t in Report.from_json(plain).tensors] == ["", ""]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    with pytest.raises(ValueError, match=r"report\.blocks\['head'\]\.error_after is"):
        report(blocks=(block(), block("head", after=value))).to_json()


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"blocks": 3}', json.dumps({**report().to_json(), "colour": 1})])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match="this is no report"):
        Report.from_json(text)


def test_sizes_are_sums():
    assert report().size_bits == 2592 + 32
    assert report().float_bits == 18432 + 32
    assert report().compression == (18432 + 32) / (2592 + 32)
    assert REPORTS["empty"].compression == 1


@pytest.mark.parametrize("name", REPORTS)
def test_the_printed_table_is_plain_and_narrow(name):
    text = str(REPORTS[name])
    assert "\x1b" not in text
    table = text.split("size ")[0]
    assert all(len(line) <= 100 for line in table.splitlines())
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_the_printed_table_says_what_happened():
    text = str(report())
    assert re.search(r"head\s+rounding\s+2e-05\s+2e-05\s+the guess stayed", text)
    assert re.search(r"stage0/block0\s+rounding\s+0\.3\s+0\.1$", text, re.M)
    assert "7.04 times smaller" in text
    assert "kept float: norm/scale: fewer than two axes" in text
    assert "one note" in text


def test_no_name_is_cut_or_read_as_markup():
    long = "a/" * 60 + "[bold]end[/bold]"
    assert long in re.sub(r"[\s]|rounding|0\.[13]|─", "", str(report(blocks=(block(long),))).split("size")[0])


@pytest.mark.parametrize("name", REPORTS)
def test_the_picture_is_a_picture_of_any_report(name, tmp_path):
    path = block_errors(REPORTS[name], tmp_path / "errors.png")
    assert path == tmp_path / "errors.png"
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.min() < 100 < pixels.max()


def test_blocks_of_zero_error_and_many_phases_are_all_drawn(tmp_path):
    def ink(blocks):
        return np.mean(np.asarray(Image.open(block_errors(report(blocks=blocks), tmp_path / "x.png")).convert("RGB")).std(-1) > 20)

    phases = tuple(block(f"b{n}", solver=f"phase{n}") for n in range(6))
    assert ink(phases) > ink(phases[:5] + (dataclasses.replace(phases[5], solver="phase0", error_before=0.1),)) > 0
    assert ink((block(before=0.0, after=0.0),)) > 0


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def read(path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_the_page_needs_nothing_else(tmp_path):
    page = read(write_html(report(), tmp_path / "report.html"))
    (link,) = page.links
    assert link.startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))).format == "PNG"
    assert not {"script", "link", "iframe"} & set(page.tags)
    for word in ("stage0/block0", "conv1, conv2", "the guess stayed", "3×3×8×8", "a scalar", "norm/scale", "one note", "conv1/kernel  int4"):
        assert word in page.text


def test_every_string_is_escaped(tmp_path):
    everywhere = report(
        blocks=(BlockRecord(HOSTILE, (HOSTILE,), 1.0, 1.0, False, 1, 1.0, HOSTILE),),
        tensors=(TensorRecord(HOSTILE, (1,), HOSTILE, 1.0, 1, 1, HOSTILE),),
        activations=(ActivationRecord(HOSTILE, HOSTILE, 0.0, 1.0, True),),
        skipped=((HOSTILE, HOSTILE),), plan=HOSTILE, notes=(HOSTILE,),
    )  # fmt: skip
    page = read(write_html(everywhere, tmp_path / "report.html"))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 3 + 3 + 2 + 2 + 1 + 1


def test_a_page_of_nothing_is_a_page(tmp_path):
    assert "None." in read(write_html(REPORTS["empty"], tmp_path / "report.html")).text
