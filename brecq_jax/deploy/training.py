"""Where a training keeps its state, so that it goes on where it was stopped: orbax, one folder for each run."""

import pathlib

import numpy as np
import orbax.checkpoint as ocp


class TrainingFolder:
    """The last state of one training, as `solvers.distilled` and `solvers.binarybert` keep it.

        solver = solvers.distilled(features, keep=deploy.TrainingFolder("runs/student/training"))

    A state is a number, which grows, and arrays. A half-written one is never read.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path).absolute()

    def latest(self) -> tuple[int, list[np.ndarray]] | None:
        """The state that was kept last; None if there is none."""
        if not self.path.is_dir():
            return None
        with ocp.CheckpointManager(self.path) as manager:
            number = manager.latest_step()
            if number is None:
                return None
            arrays = manager.restore(number, args=ocp.args.StandardRestore())
        return number, [np.asarray(arrays[f"{n:05d}"]) for n in range(len(arrays))]

    def keep(self, number: int, arrays: list) -> None:
        """Write a state, and remove the one before it."""
        with ocp.CheckpointManager(self.path, options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
            manager.save(number, args=ocp.args.StandardSave({f"{n:05d}": np.asarray(a) for n, a in enumerate(arrays)}))
            manager.wait_until_finished()
