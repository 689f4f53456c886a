"""`dvc exp run --temp`, run at the same time as others like it.

    python -m flows.experiment [DVC's own arguments: --wait-for-lock exp run --temp ...]

DVC hands an experiment to its runner through a stash that all its processes share, and the runner
takes whatever lies there, until nothing does. Of two processes side by side, one may so run the
other's settings and be blamed for its failure, while the other ends well and ran nothing (seen in
DVC 3.67). Here a process takes only what it put there, while it still holds DVC's lock.
"""

import sys

from dvc.cli import main
from dvc.repo.experiments.exceptions import ExpQueueEmptyError
from dvc.repo.experiments.executor.local import TempDirExecutor
from dvc.repo.experiments.queue import tempdir
from dvc.repo.experiments.queue.base import QueueEntry, QueueGetResult


class OwnQueue(tempdir.TempDirQueue):
    """DVC's queue of experiments in temporary folders, as if no other process put any there."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._own: list[QueueGetResult] = []

    def put(self, *args, **kwargs) -> QueueEntry:
        entry = super().put(*args, **kwargs)
        executor = self.init_executor(
            self.repo.experiments, entry, TempDirExecutor, wdir=self._standalone_tmp_dir
        )
        self._own.append(QueueGetResult(entry, executor))
        return entry

    def get(self) -> QueueGetResult:
        if not self._own:
            raise ExpQueueEmptyError("This process has no further experiment.")
        return self._own.pop()


if __name__ == "__main__":
    tempdir.TempDirQueue = OwnQueue  # ty: ignore[invalid-assignment]
    sys.exit(main(sys.argv[1:]))
