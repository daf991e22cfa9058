"""The records of one quantization."""

import dataclasses
import io
import json
import math
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

WIDTH = 100  # columns of the printed report
MB = 8e6  # bits


@dataclasses.dataclass(frozen=True)
class BlockRecord:
    """One block under one solver. Errors are on held-out calibration inputs; `kept` False: the guess stayed."""

    name: str
    ops: tuple[str, ...]
    error_before: float
    error_after: float
    kept: bool
    steps: int
    wall_seconds: float
    solver: str


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """One parameter. `bits`: true bits an element, grid included. `note`: what else is to be said of it."""

    name: str
    shape: tuple[int, ...]
    format: str
    bits: float
    size_bits: int
    float_bits: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ActivationRecord:
    """One activation's grid: its ends, and whether it reaches below zero."""

    name: str
    format: str
    low: float
    high: float
    signed: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done. `skipped`: (what, why) stayed float. Law: from_json(to_json()) is the same report."""

    blocks: tuple[BlockRecord, ...]
    tensors: tuple[TensorRecord, ...]
    activations: tuple[ActivationRecord, ...]
    skipped: tuple[tuple[str, str], ...]
    plan: str
    wall_seconds: float
    compiled_programs: int
    notes: tuple[str, ...]

    @property
    def size_bits(self) -> int:
        """Bits of all parameters, as packed."""
        return sum(t.size_bits for t in self.tensors)

    @property
    def float_bits(self) -> int:
        """Bits of all parameters as they came."""
        return sum(t.float_bits for t in self.tensors)

    @property
    def compression(self) -> float:
        """How many times smaller than they came; 1 for a report of no parameters."""
        return self.float_bits / self.size_bits if self.size_bits else 1.0

    def __str__(self) -> str:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("block", overflow="fold")
        table.add_column("phase")
        table.add_column("held-out before", justify="right")
        table.add_column("held-out after", justify="right")
        table.add_column("")
        for b in self.blocks:
            row = (b.name, b.solver, f"{b.error_before:.5g}", f"{b.error_after:.5g}", kept_note(b))
            table.add_row(*map(rich.text.Text, row))  # Text: a name with [brackets] is no markup
        lines = [self.sizes(), *(f"kept float: {name}: {why}" for name, why in self.skipped), *self.notes]
        return "\n".join(([_plain(table)] if self.blocks else []) + lines)

    def sizes(self) -> str:
        """One line: how large, and how much smaller."""
        return f"size {self.size_bits / MB:.3f} MB, in float {self.float_bits / MB:.3f} MB ({self.compression:.2f} times smaller)"

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists, for json.dumps. Raises ValueError, with the record's name, on numbers that are not finite."""
        record = dataclasses.asdict(self)
        for where, value in _leaves(record, "report"):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where} is {value}, which JSON cannot hold. Was there a division by zero, or a loss that diverged?")
        return json.loads(json.dumps(record, allow_nan=False))

    @classmethod
    def from_json(cls, record: dict[str, Any] | str) -> "Report":
        """The inverse of to_json; takes the text of it, too. Raises ValueError if it is no report."""
        try:
            fields = dict(json.loads(record) if isinstance(record, str) else record)
            for name, kind in (("blocks", BlockRecord), ("tensors", TensorRecord), ("activations", ActivationRecord)):
                fields[name] = tuple(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in fields[name])
            fields["skipped"] = tuple((name, why) for name, why in fields["skipped"])
            return cls(**{**fields, "notes": tuple(fields["notes"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"from_json: this is no report: {type(error).__name__}: {error}. Pass what to_json() gave.") from error


def kept_note(block: BlockRecord) -> str:
    """What tables say beside a block whose guess was not improved on."""
    return "" if block.kept else "the guess stayed"


def _plain(table: rich.table.Table) -> str:
    text = io.StringIO()
    rich.console.Console(file=text, width=WIDTH, no_color=True, force_terminal=False, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())


def _leaves(value: Any, where: str):
    """(place, value) of all plain values; a record is placed by its name."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _leaves(inside, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for n, inside in enumerate(value):
            yield from _leaves(inside, f"{where}[{inside['name']!r}]" if isinstance(inside, dict) else f"{where}[{n}]")
    else:
        yield where, value
