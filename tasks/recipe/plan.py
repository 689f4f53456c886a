"""Check all that can be known of a recipe before its first stage runs."""

import os
from importlib import import_module

from alloy.errors import DeviceError, ProcessError
from tasks.recipe.gates import check_gates
from tasks.recipe.graph import write_graph
from tasks.recipe.load import Recipe, check_alone, load
from tasks.recipe.section import ParamsError
from tasks.sources.place import place
from tasks.sources.source import SourceError
from tasks.workers.together import num_processes


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
    check_gates(recipe)
    try:
        num_processes()
    except ProcessError as error:
        raise ParamsError(str(error)) from error
    write_graph(name)
    return recipe


def check_contents(recipe: Recipe) -> None:
    """Refuse presets, writers, benchmarks and their options, and devices, that do not exist.

    It may import torch and the data's modules, which takes seconds: for when a stage is to run.

    Raises:
        ParamsError: as `check`.
    """
    if (num := num_processes()) > 1 or os.environ.get("ALLOY_DEVICE"):
        from alloy.devices import devices_of_processes

        try:
            devices_of_processes(num)
        except DeviceError as error:
            raise ParamsError(str(error)) from error
    import_module(f"tasks.{recipe.kind}.checks").check(recipe)
