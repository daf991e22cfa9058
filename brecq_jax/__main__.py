"""python -m brecq_jax --config=configs/NAME.py --workdir=DIR [--devices=N | --process=…] [--config.KEY=VALUE …]"""

import argparse
import contextlib
import ctypes
import dataclasses
import pathlib
import re
import runpy
import sys
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np
from jax.sharding import Mesh

from brecq_jax._experiment import execute

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
WORDS = {bool: {"true": True, "1": True, "false": False, "0": False}, NoneType: {"none": None}}  # values that are written so alone


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one config. Prints the result and returns it."""
    parser = argparse.ArgumentParser(prog="python -m brecq_jax", description=__doc__)
    parser.add_argument("--config", required=True, help="a file that defines a dataclass `Config` with `build()`")
    parser.add_argument("--workdir", required=True, help="a folder for model/, result.json, report.html: new, or an interrupted run's, to go on")
    parser.add_argument("--quiet", action="store_true", help="no plan and no progress bar")
    parser.add_argument("--float-outputs", help="a folder that keeps what the float model gives while it is scored, for other runs of it")
    parser.add_argument("--devices", type=int, help="how many devices share each batch: 1 without this; 0: all of them")
    parser.add_argument("--process", default="", help="one of many, on all their devices: I/N@HOST:PORT for process I of 0 to N-1, "
                        "HOST:PORT that of process 0; or `auto` on a TPU pod, under SLURM or Open MPI")  # fmt: skip
    known, overrides = parser.parse_known_args(arguments)
    keep_memory()
    try:
        mesh = make_mesh(known.devices, known.process)
        config = load_config(known.config, overrides)
        settings = {"config": known.config, **dataclasses.asdict(config)}
        progress = not known.quiet and jax.process_index() == 0
        result = execute(config.build(), known.workdir, settings, progress, mesh, known.float_outputs)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"{type(error).__name__}: {error}\n")
    print(*(f"{name}: {value:.4g}" for name, value in result["figures"].items()), sep="\n")
    print(f"size: {result['size_mb']:.3f} MB, in float {result['float_mb']:.3f} MB")
    print(f"quantized in {result['quantize_seconds']:.0f} s; written to {known.workdir}")
    return result


def make_mesh(devices: int | None, process: str) -> Mesh | None:
    """The mesh of the command line; None for one device. Joins the other processes, where there are some.

    Raises:
      ValueError: there are not so many devices, or the process is not understood, or is to use some of its devices alone.
    """
    match = re.fullmatch(r"(\d+)/(\d+)@(.+:\d+)", process)
    if process not in ("", "auto") and (not match or int(match[1]) >= int(match[2])):
        raise ValueError(f"--process={process}: write I/N@HOST:PORT with I from 0 to N-1, as 0/2@localhost:1234, or auto.")
    if process and devices:
        raise ValueError(f"--devices={devices} with --process={process}: many processes share each batch on all their devices. Leave --devices out.")
    if match:
        jax.distributed.initialize(match[3], int(match[2]), int(match[1]))
    elif process:
        jax.distributed.initialize()
    devices = (0 if process else 1) if devices is None else devices
    if not 0 <= devices <= jax.device_count():
        raise ValueError(f"--devices={devices}: there are {jax.device_count()}. Write 0 for all of them.")
    return None if devices == 1 else Mesh(np.array(jax.devices()[: devices or None]), ("data",))


def keep_memory():
    """Keep the memory of a step's temporaries, which glibc gives back and asks for anew at every step.

    That is a third of a depthwise block's step on a CPU: `benchmarks/steps.py`, with and without `--default-malloc`.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def load_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """The `Config` of a file, with `--config.KEY=VALUE` applied; values are read as the field's type."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"--config: there is no file {path}.")
    kind = runpy.run_path(path, run_name=f"config:{pathlib.Path(path).stem}").get("Config")
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"--config: {path} defines no dataclass `Config`.")
    types = {f.name: f.type if isinstance(f.type, type) else get_type_hints(kind)[f.name] for f in dataclasses.fields(kind)}
    values = {}
    for override in overrides:
        name, sign, text = override.removeprefix("--config.").partition("=")
        if not override.startswith("--config.") or not sign:
            raise ValueError(f"{override}: not understood. Overrides are --config.KEY=VALUE.")
        if name not in types:
            raise ValueError(f"--config.{name}: {path} has no such key. It has {', '.join(types)}.")
        values[name] = _parse(name, text, types[name])
    return kind(**values)


def _parse(name: str, text: str, kind: Any) -> Any:
    kinds = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    for one in kinds:
        if text.lower() in WORDS.get(one, ()):
            return WORDS[one][text.lower()]
    for one in kinds:
        if get_origin(one) is tuple:
            return tuple(_parse(name, part, get_args(one)[0]) for part in text.split(",") if part)
        if one not in WORDS:
            with contextlib.suppress(ValueError):
                return one(text)
    wanted = "true or false" if kind is bool else f"a value of type {' or '.join(one.__name__.removesuffix('Type') for one in kinds)}"
    raise ValueError(f"--config.{name}={text}: write {wanted}.")


if __name__ == "__main__":
    main(sys.argv[1:])
