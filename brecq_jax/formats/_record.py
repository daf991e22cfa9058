"""Formats as plain dicts, for files that people may read and edit."""

import dataclasses
from typing import Any

from brecq_jax import formats


def to_record(format: Any) -> dict[str, Any]:
    """Of a format, or of a range rule inside it: `{"type": "Uniform", "bits": 4, …}`. Law: from_record(to_record(format)) == format."""
    fields = {f.name: getattr(format, f.name) for f in dataclasses.fields(format)}
    return {"type": type(format).__name__} | {k: to_record(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()}


def from_record(record: dict[str, Any]) -> Any:
    """The inverse; fields that the record leaves out take their defaults.

    Raises:
      ValueError: no format of this library has that name.
    """
    name = record.get("type")
    kind = getattr(formats, name, None) if name in formats.__all__ else None
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f'The format {name!r} is unknown. Write one of this library, as {{"type": "Uniform", "bits": 4}}.')
    fields = {k: from_record(v) if isinstance(v, dict) else tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    fields.pop("type")
    return kind(**fields)
