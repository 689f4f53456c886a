"""What every stage's command line shares: `python -m tasks.<stage> RECIPE`."""

import argparse
import sys
from collections.abc import Callable

from tasks.params import PARAMS, recipes


def run_stage(main: Callable[[str], None], description: str | None) -> None:
    """Parse `RECIPE`, run the stage; what a user can get wrong ends with its message, not a traceback."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = recipes() if (PARAMS / "recipes.yaml").is_file() else []
    parser.add_argument("recipe", help=f"a recipe of params/recipes.yaml: {', '.join(known)}")
    recipe = parser.parse_args().recipe
    try:
        main(recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog.removesuffix('.py')}: {error}")
