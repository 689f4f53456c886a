"""What every stage's command line shares: `python -m tasks.<stage> RECIPE`."""

import argparse
import sys
from collections.abc import Callable, Mapping

from tasks.params import PARAMS, recipes


def run_stage(
    main: Callable[..., None], description: str | None, switches: Mapping[str, str] | None = None
) -> None:
    """Parse `RECIPE`, run the stage; what a user can get wrong ends with its message, not a traceback.

    `switches` are `--names` with their help; none of them changes a stage's result (params do).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = recipes() if (PARAMS / "recipes.yaml").is_file() else []
    parser.add_argument("recipe", help=f"a recipe of params/recipes.yaml: {', '.join(known)}")
    for name, text in (switches or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = vars(parser.parse_args())
    try:
        main(**options)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog.removesuffix('.py')}: {error}")
