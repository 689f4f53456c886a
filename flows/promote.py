"""Make the challenger the champion, if its gates are met; or undo the last promotion.

    python -m flows.promote modality
    python -m flows.promote modality --dry-run
    python -m flows.promote modality --regardless "the champion was measured on retired data"
    python -m flows.promote modality --rollback
    python -m flows.promote modality --history
    python -m flows.promote modality --to http://mlflow.production:5000

Where a Prefect server is set or `make serve` runs, it is a flow of that server. Without one it is
done here: starting a server would take longer than promoting.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.services import ServerError
from flows.workspace import complain, end_as_ctrl_c, only_run
from tasks.recipe.load import load
from tasks.recipe.section import ParamsError
from tasks.registry import champions, promotion, tracking
from tasks.registry.champions import Outcome, RefusedError, directly


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    end_as_ctrl_c()
    try:
        load(options.recipe)
        if options.history:
            print(champions.history(options.recipe))
            return 0
        if options.to:
            print(champions.copy(options.recipe, options.to).message)
            return 0
        if not options.rollback and options.regardless is None:
            promotion.load_gates(options.recipe)
        tracking.connect()
        if _has_server():
            return _in_prefect(options)
        what = "rollback" if options.rollback else "promotion"
        with only_run(f"{what} of {options.recipe}"):
            outcome = _act(options)
    except (
        ParamsError, RefusedError, tracking.TrackingError, tracking.NotRegisteredError,
        ServerError, OSError,
    ) as error:  # fmt: skip
        complain(error)
        return 1 if isinstance(error, RefusedError | tracking.NotRegisteredError) else 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    if outcome.decision and outcome.decision.comparisons:
        print(promotion.table(outcome.decision))
    print(outcome.message)
    return 0


def _has_server() -> bool:
    """True where Prefect is told of a server: by the environment, or by a profile."""
    profiles = Path(os.environ["PREFECT_HOME"]) / "profiles.toml"
    return bool(os.environ.get("PREFECT_API_URL")) or profiles.is_file()


def _act(options: argparse.Namespace) -> Outcome:
    if not options.rollback:
        return champions.promote(
            options.recipe, directly, regardless=options.regardless, dry_run=options.dry_run
        )
    return champions.rollback(
        options.recipe, directly, dry_run=options.dry_run, confirm=_confirm(options.yes)
    )


def _confirm(yes: bool) -> Callable[[str], bool]:
    """Ask on a terminal; elsewhere nothing but `--yes` is a yes."""

    def confirm(question: str) -> bool:
        if yes:
            return True
        if not sys.stdin.isatty():
            return False
        return input(f"{question}.\nTake it away? [y/N] ").strip().lower() in ("y", "yes")

    return confirm


def _in_prefect(options: argparse.Namespace) -> int:
    from flows.promotion import promote, rollback
    from flows.server import own_server

    with own_server():
        state = (
            rollback(
                options.recipe,
                yes=options.yes,
                dry_run=options.dry_run,
                return_state=True,
            )
            if options.rollback
            else promote(
                options.recipe, options.regardless, dry_run=options.dry_run, return_state=True
            )
        )
    print(state.message, file=sys.stdout if state.is_completed() else sys.stderr)
    return 0 if state.is_completed() else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.promote",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", default="modality")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--rollback", action="store_true", help="undo the last promotion")
    choice.add_argument("--regardless", metavar="REASON", help="promote without a comparison")
    choice.add_argument("--history", action="store_true", help="show every version in one table")
    choice.add_argument("--to", metavar="URI", help="copy the champion to another MLflow")
    parser.add_argument("--dry-run", action="store_true", help="decide, and change nothing")
    parser.add_argument(
        "--yes", action="store_true", help="with --rollback: even if nobody was champion before"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
