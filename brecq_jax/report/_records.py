"""The records of one quantization."""

import dataclasses
import json
from typing import Any


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
    """One parameter. `bits`: true bits an element, grid included."""

    name: str
    shape: tuple[int, ...]
    format: str
    bits: float
    size_bits: int
    float_bits: int


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
    """What was done. `skipped`: (what, why) stayed float."""

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
        """Bits of all parameters in float32."""
        return sum(t.float_bits for t in self.tensors)

    def __str__(self) -> str:
        lines = [f"{'block':40} {'phase':10} {'before':>12} {'after':>12}  held-out error"]
        for b in self.blocks:
            stayed = "" if b.kept else "  the guess stayed"
            lines.append(f"{b.name[:40]:40} {b.solver:10} {b.error_before:12.5g} {b.error_after:12.5g}{stayed}")
        ratio = self.float_bits / max(self.size_bits, 1)
        lines.append(f"size {self.size_bits / 8e6:.3f} MB, in float {self.float_bits / 8e6:.3f} MB ({ratio:.2f} times smaller)")
        lines += [f"kept float: {name}: {why}" for name, why in self.skipped]
        lines += list(self.notes)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As plain dicts and lists. Raises ValueError on numbers that are not finite."""
        return json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Report":
        """The inverse of to_json."""
        kinds = {"blocks": BlockRecord, "tensors": TensorRecord, "activations": ActivationRecord}
        fields = dict(record)
        for name, kind in kinds.items():
            fields[name] = tuple(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in r.items()}) for r in record[name])
        fields["skipped"] = tuple((name, why) for name, why in record["skipped"])
        return cls(**{**fields, "notes": tuple(record["notes"])})
