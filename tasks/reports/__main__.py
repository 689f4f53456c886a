"""Print the tables of a recipe's last evaluation.

    python -m tasks.reports RECIPE              # on the terminal
    python -m tasks.reports RECIPE --publish    # and put them into docs/results.md

The page with charts and examples is reports/<recipe>/report.html.
"""

import argparse
import sys
from collections.abc import Sequence

from tasks.recipe.load import read
from tasks.reports import tables
from tasks.reports.publish import publish


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.reports",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe of params/recipes.yaml")
    parser.add_argument("--publish", action="store_true", help="also put them into docs/results.md")
    given = parser.parse_args(arguments)
    try:
        read(given.recipe)  # refuses a recipe that does not exist
        tables.show(given.recipe)
        if given.publish:
            publish(given.recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"reports: {error}")


if __name__ == "__main__":
    main()
