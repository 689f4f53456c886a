"""What every stage's command line shares: `python -m tasks.<stage> RECIPE`."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tasks.params import KINDS, PARAMS, kind, recipes
from tasks.storage import write_folder, write_json

# What the stages write that a recipe may do without.
OPTIONAL_OUTPUTS = {
    "prepare": ["data/{recipe}"],
    "collect": ["models/{recipe}/statistics"],
    "align": ["models/{recipe}/transforms"],
    "finetune": ["models/{recipe}/finetuned", "models/{recipe}/finetuned_arms"],
    "register": ["models/{recipe}/registered.json"],
}


def run_stage(
    main: Callable[..., None], description: str | None, switches: Mapping[str, str] | None = None
) -> None:
    """Parse `RECIPE`, run the stage; what a user can get wrong ends with its message, not a traceback.

    `switches` are `--names` with their help; none of them changes a stage's result (params do).
    A stage that the recipe's kind has no section for writes its outputs empty, so that the graph holds.
    """
    stage = _module_name()
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{stage}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = recipes() if (PARAMS / "recipes.yaml").is_file() else []
    parser.add_argument("recipe", help=f"a recipe of params/recipes.yaml: {', '.join(known)}")
    for name, text in (switches or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = vars(parser.parse_args())
    recipe = options["recipe"]
    try:
        if stage in OPTIONAL_OUTPUTS and stage not in KINDS[kind(recipe)]:
            leave_out(stage, recipe)
        else:
            main(**options)
    except ConnectionError as error:
        # Nothing is wrong with what was asked: flows try such a stage again.
        print(f"{stage}: {error}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except (ValueError, OSError) as error:
        sys.exit(f"{stage}: {error}")


def leave_out(stage: str, recipe: str) -> None:
    """Write empty outputs with a note; the manifest of no data lists no files."""
    note = f"recipe {recipe!r} is of kind {kind(recipe)!r}, which has no stage {stage!r}"
    nothing = {"files": {}, "note": note}
    for output in (Path(pattern.format(recipe=recipe)) for pattern in OPTIONAL_OUTPUTS[stage]):
        if output.suffix == ".json":
            write_json(output, nothing)
            continue
        with write_folder(output) as folder:
            write_json(folder / "manifest.json", nothing)
    print(f"{stage}: {note}")


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "a stage is run as python -m tasks.<stage>"
    return spec.name.rpartition(".")[2]
