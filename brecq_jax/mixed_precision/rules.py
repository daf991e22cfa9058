"""Plans as files to read, edit and hand on."""

import json
import pathlib
from typing import Any

from brecq_jax._plan import Plan
from brecq_jax.formats._record import from_record, to_record

KINDS = ("weights", "activations")


def save_rules(plan: Plan, path: str | pathlib.Path):
    """Write `plan.rules` as JSON: a format or null for each name, and the preset."""
    rules = plan.rules
    record = {kind: {name: format and to_record(format) for name, format in rules[kind].items()} for kind in KINDS}
    pathlib.Path(path).write_text(json.dumps(record | {"preset": plan.preset}, indent=1))


def load_rules(path: str | pathlib.Path) -> dict[str, Any]:
    """The rules of a file: `quantize(params, apply_fn, calib_ds, **load_rules(path))`.

    Raises:
      ValueError: a file of something else, or a format that is unknown.
    """
    record = json.loads(pathlib.Path(path).read_text())
    if not isinstance(record, dict) or set(record) != {*KINDS, "preset"}:
        raise ValueError(f"load_rules: {path} holds no rules. Write what save_rules wrote: {', '.join(KINDS)} and preset.")
    return {kind: {name: own and from_record(own) for name, own in record[kind].items()} for kind in KINDS} | {"preset": record["preset"]}
