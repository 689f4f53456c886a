"""`params/placement.yaml`: which stages run in which of Prefect's work pools, and on what terms."""

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from alloy.errors import nearest
from flows import graph
from tasks.recipe.graph import STAGES
from tasks.recipe.load import PARAMS, load_file, recipes
from tasks.recipe.section import ParamsError, Section

FILE = PARAMS / "placement.yaml"
TRACKING = "MLFLOW_TRACKING_URI"


class Pool(Section):
    """A work pool of the Prefect server, and what holds for every stage that is placed in it."""

    concurrency: PositiveInt | None = None  # stages at a time, over all who use the pool
    tags: list[str] = Field(default=[])  # of the runs, to find them by
    device: str | None = None  # ALLOY_DEVICE of the stage; the worker's own without it
    processes: PositiveInt | None = None  # ALLOY_PROCESSES of the stage
    timeout_seconds: PositiveFloat | None = None  # of a run, from when a worker began it
    wait_seconds: PositiveFloat = 3600.0  # for a worker to begin
    lost_seconds: PositiveFloat = 60.0  # without a sign of life, then the worker counts as lost
    retries: NonNegativeInt = 2  # runs after one whose worker was lost
    job_variables: dict[str, Any] = Field(default={})  # of the pool's type: an image, a namespace


class Placement(Section):
    """The pools, and the stages placed in them; what is not named runs where the flow runs."""

    pools: dict[str, Pool] = Field(default={})
    stages: dict[str, str] = Field(default={})  # STAGE, or STAGE@RECIPE for one recipe: its pool

    @model_validator(mode="after")
    def _pools_are_listed(self) -> "Placement":
        for stage, pool in self.stages.items():
            if pool not in self.pools:
                raise ValueError(
                    f"stages.{stage}: pool {pool!r} is not among `pools`: "
                    f"{nearest(pool, list(self.pools))}"
                )
        return self


def placed(addresses: Sequence[str]) -> dict[str, tuple[str, Pool]]:
    """The name and terms of the pool of each of these stages that `params/placement.yaml` places.

    Raises:
        ParamsError: names the key of the file and what would be right.
    """
    if not FILE.is_file():
        return {}
    placement = load_file("placement", Placement)
    if not placement.stages:
        return {}
    _refuse_unknown(list(placement.stages))
    pools = {}
    for address in addresses:
        name = placement.stages.get(address) or placement.stages.get(address.partition("@")[0])
        if name is not None:
            pools[address] = (name, placement.pools[name])
    _refuse_local_registry([address for address in pools if address.startswith("register@")])
    return pools


def _refuse_unknown(names: Sequence[str]) -> None:
    known = list(dict.fromkeys([*graph.names(), *STAGES]))
    for name in names:
        stage, at, recipe = name.partition("@")
        if stage not in known:
            raise ParamsError(f"{FILE}: stages.{name}: no stage has this name: "
                              f"{nearest(stage, known)}")  # fmt: skip
        if at and recipe not in recipes():
            raise ParamsError(f"{FILE}: stages.{name}: no recipe has this name: "
                              f"{nearest(recipe, recipes())}")  # fmt: skip


def _refuse_local_registry(addresses: Sequence[str]) -> None:
    """Refuse to register elsewhere in a file here, which the worker would not see."""
    if addresses and urlsplit(os.environ.get(TRACKING, "")).scheme not in ("http", "https"):
        raise ParamsError(
            f"{FILE}: {addresses[0]} is placed in a pool, and its MLflow is a file of one machine: "
            f"set {TRACKING} to a server, here and on the worker, or leave register here"
        )
