"""Everything that can be known of a recipe before its first stage runs."""

from tasks.recipe.graph import write_graph
from tasks.recipe.load import Recipe, check_alone, load, load_file
from tasks.recipe.section import ParamsError
from tasks.recipe.shared import PromoteParams
from tasks.sources.place import place
from tasks.sources.source import SourceError


def check(name: str) -> Recipe:
    """Refuse a recipe that any of its stages would refuse; bring the stage graph up to date.

    Raises:
        ParamsError: names the file, the key and what would be right.
    """
    recipe = load(name)
    check_alone(recipe)
    for key, checkpoint in recipe.fetch.checkpoints.items():
        try:
            place(checkpoint.source)
        except SourceError as error:
            raise ParamsError(f"{recipe.where}: fetch.checkpoints.{key}: {error}") from error
    load_file("promote", PromoteParams)
    write_graph()
    return recipe
