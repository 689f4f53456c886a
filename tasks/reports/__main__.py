"""Print the tables of a recipe's last evaluation.

    python -m tasks.reports RECIPE             # on the terminal
    python -m tasks.reports RECIPE --readme    # and put them into README.md, between its marks

The page with charts and examples is reports/<recipe>/report.html.
"""

import argparse
import sys
from collections.abc import Sequence

from tasks.recipe.load import read
from tasks.reports import readme, tables


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.reports",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a recipe of params/recipes.yaml")
    parser.add_argument("--readme", action="store_true", help="also put the tables into README.md")
    given = parser.parse_args(arguments)
    try:
        read(given.recipe)  # refuses a recipe that does not exist
        tables.show(given.recipe)
        if given.readme:
            readme.write_readme(given.recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"reports: {error}")


if __name__ == "__main__":
    main()
