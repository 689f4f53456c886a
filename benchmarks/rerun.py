"""Run a study: a DVC pipeline apart from THE graph, whose stages recipes never need.

    python -m benchmarks.rerun benchmarks/gauge                    # what is stale of it
    python -m benchmarks.rerun benchmarks/towers whisper@all-0     # one stage, and what it needs
    python -m benchmarks.rerun pretrain/multitask --dry

A study's pipeline is called `study.yaml`, which DVC does not look for, so that `dvc pull`, `dvc
status` and the rest speak of recipes alone. It lies beside itself as `dvc.yaml` while it runs; what
its stages recorded stays in the `dvc.lock` there.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

PIPELINE = "study.yaml"


@contextmanager
def opened(folder: Path) -> Generator[Path]:
    """Let DVC see a study for the length of the block; yields its `dvc.yaml`.

    Raises:
        FileNotFoundError: the folder holds no study.
    """
    study, shown = folder / PIPELINE, folder / "dvc.yaml"
    if not study.is_file():
        known = sorted(str(path.parent) for path in Path().glob(f"*/*/{PIPELINE}"))
        raise FileNotFoundError(f"{study} is missing; studies are {', '.join(known) or 'nowhere'}")
    shutil.copyfile(study, shown)
    try:
        yield shown
    finally:
        shown.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rerun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", type=Path, help="the folder of a study.yaml")
    parser.add_argument("stages", nargs="*", help="all of them, unless some are named")
    options, others = parser.parse_known_args(arguments)
    try:
        with opened(options.study) as pipeline:
            targets = [f"{pipeline}:{stage}" for stage in options.stages] or [str(pipeline)]
            command = [sys.executable, "-m", "dvc", "repro", *others, *targets]
            return subprocess.run(command).returncode
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
