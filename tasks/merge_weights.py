"""merge_weights: merge checkpoints on disk, without a recipe: `python -m tasks.merge_weights METHOD OUTPUT SOURCE...`

    python -m tasks.merge_weights ties merged a=models/a b=models/b --base models/seed \\
        --coefficients 0.6 0.4 --set density=0.3 --dry-run

A source is a folder with config.json and safetensors, or one safetensors file; `name=path` names it. Everything is
checked before a tensor is read; `--dry-run` prints the plan and stops. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alloy.checkpoint import MergePlan, plan_merge, run_plan

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_REDRAW_SECONDS = 0.2


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    try:
        plan = plan_merge(
            given.method,
            _sources(given.sources),
            given.output,
            base=given.base,
            coefficients=_coefficients(given),
            statistics=_pairs(given.statistics, "statistics", Path) or None,
            dtype=given.dtype,
            shard_bytes=None if given.shard_bytes is None else _num_bytes(given.shard_bytes),
            tokenizer=given.tokenizer,
            copy=_pairs(given.copy, "copy", str),
            drop=given.drop,
            allow=given.allow,
            **_pairs(given.set, "set", _value),
        )
        if given.dry_run:
            print(plan)
            return
        command = shlex.join(["python", "-m", "tasks.merge_weights", *(arguments or sys.argv[1:])])
        with _Progress(plan) as progress:
            report = run_plan(
                plan,
                threads=given.threads,
                hash_sources=given.hash_sources,
                command=command,
                on_bytes=progress.add,
            )
    except (ValueError, OSError) as error:
        sys.exit(f"merge_weights: {error}")
    for note in report.notes:
        print(f"merge_weights: note: {note}")
    if report.resumed:
        print(f"merge_weights: went on after {', '.join(report.resumed)}")
    print(
        f"merge_weights: wrote {report.output}: {report.num_tensors} tensors, {report.num_bytes:,} bytes "
        f"in {report.seconds:.1f} s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.merge_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("method", help="a merge method of docs/methods.md")
    add("output", type=Path, help="a folder that does not exist or is empty")
    add("sources", nargs="+", metavar="[NAME=]SOURCE", help="the checkpoints, in order")
    add("--base", type=Path, help="the checkpoint that the sources were trained from")
    add("--coefficients", nargs="+", type=float, metavar="C", help="one for each source")
    add(
        "--coefficients-of",
        action="append",
        default=[],
        metavar="PATTERN=C,C,...",
        help="by glob pattern of tensor names; the first that matches decides",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help='the method\'s options; by pattern of tensor names density={"*attn*": 0.3, "*": 0.5}',
    )
    add(
        "--statistics",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="Grams or Fisher diagonals of a source",
    )
    add("--dtype", help="of the result; by default that of the sources")
    add("--shard-bytes", metavar="SIZE", help="the most that a file holds, as 5GB")
    add("--tokenizer", default="same", help="where vocabularies differ: same (refuse), base, union")
    add(
        "--copy",
        action="append",
        default=[],
        metavar="PATTERN=NAME",
        help="tensors taken as they are from one source",
    )
    add("--drop", action="append", default=[], metavar="PATTERN", help="tensors to leave out")
    add("--allow", action="append", default=[], metavar="KEY", help="config keys that may differ")
    add("--threads", type=int, help="workers; by default all cores")
    add("--hash-sources", action="store_true", help="record SHA-256 of sources without a manifest")
    add("--dry-run", action="store_true", help="print the plan and stop")
    return parser


def _sources(given: Sequence[str]) -> list[str] | dict[str, str]:
    """Paths in order, or by name if the first has one."""
    if "=" not in given[0]:
        return list(given)
    named = _pairs(given, "source", str)
    if len(named) != len(given):
        raise ValueError(f"sources {list(given)}: two have one name")
    return named


def _coefficients(given: argparse.Namespace) -> list[float] | dict[str, list[float]] | None:
    if given.coefficients is not None and given.coefficients_of:
        raise ValueError(
            "--coefficients and --coefficients-of: end the patterns with '*=...' instead"
        )
    if given.coefficients_of:
        return _pairs(
            given.coefficients_of, "coefficients-of", lambda row: [float(c) for c in row.split(",")]
        )
    return given.coefficients


def _pairs(given: Sequence[str], what: str, convert) -> dict[str, Any]:
    """`KEY=VALUE` arguments as a mapping."""
    pairs = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--{what} {text}: write NAME=VALUE")
        pairs[key] = convert(value)
    return pairs


def _value(text: str) -> Any:
    """A number, a boolean or a list as JSON writes it; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _num_bytes(text: str) -> int:
    """A size as people write it, `5GB`."""
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        return int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
    except ValueError:
        raise ValueError(
            f"--shard-bytes {text}: write a number and one of {', '.join(_UNITS)}"
        ) from None


class _Progress:
    """Share of the bytes written, redrawn in place on a terminal."""

    def __init__(self, plan: MergePlan):
        self.total, self.done, self.drawn = plan.num_bytes, 0, 0.0
        self.shown = sys.stderr.isatty()
        self.lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.done += num_bytes
            if self.shown and time.monotonic() - self.drawn > _REDRAW_SECONDS:
                self.drawn = time.monotonic()
                share = self.done / max(1, self.total)
                print(f"\r{share:6.1%} of {self.total / 1e9:.2f} GB", end="", file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            print("\r" + " " * 30, end="\r", file=sys.stderr)


if __name__ == "__main__":
    main()
