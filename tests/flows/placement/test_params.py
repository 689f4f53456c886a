"""`params/placement.yaml`: what is placed where, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.placement.dispatch import refuse_without_server
from flows.placement.params import Placement, Pool, placed
from tasks.recipe.section import ParamsError
from tests.flows.conftest import REPOSITORY, Workspace

ADDRESSES = ["fetch@toy", "merge@toy", "register@toy"]


def place(toy: Workspace, pools: Any, stages: Any) -> None:
    path = toy.folder / "params" / "placement.yaml"
    path.write_text(yaml.safe_dump({"pools": pools, "stages": stages}))


@pytest.fixture
def here(toy: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(toy.folder)
    return toy


def test_nothing_is_placed_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shipped file places nothing, and its example in comments is valid; no file, no pools."""
    monkeypatch.chdir(REPOSITORY)
    assert placed(["merge@modality"]) == {}
    text = (REPOSITORY / "params/placement.yaml").read_text()
    example = text.partition("# pools:")[2].partition("\npools:")[0]
    lines = "\n".join(line.removeprefix("# ") for line in f"# pools:{example}".splitlines())
    assert Placement.model_validate(yaml.safe_load(lines)).pools["gpu"].device == "cuda"
    monkeypatch.chdir(tmp_path)
    assert placed(["merge@modality"]) == {}


def test_a_stage_of_one_recipe_goes_before_the_stage_of_all(here: Workspace) -> None:
    """`merge@toy` decides for that recipe, `merge` for the others."""
    place(here, {"gpu": {"tags": ["large"]}, "cpu": {}}, {"merge": "cpu", "merge@toy": "gpu"})
    assert placed(ADDRESSES) == {"merge@toy": ("gpu", Pool(tags=["large"]))}
    assert placed(["fetch@toy"]) == {}


@pytest.mark.parametrize(
    ("pools", "stages", "message"),
    [
        ({"gpu": {}}, {"merge": "gup"}, "stages.merge: pool 'gup' is not among `pools`: "
                                        "did you mean 'gpu'"),
        ({"gpu": {}}, {"merg": "gpu"}, "stages.merg: no stage has this name: did you mean 'merge'"),
        ({"gpu": {}}, {"merge@tou": "gpu"}, "no recipe has this name: did you mean 'toy'"),
        ({"gpu": {"timeout": 3}}, {}, "unknown key 'timeout': did you mean 'timeout_seconds'"),
        ({"gpu": {"concurrency": 0}}, {}, "pools.gpu.concurrency: "),
        ({"gpu": {}}, {"register": "gpu"}, "register@toy is placed in a pool, and its MLflow is a "
                                           "file of one machine"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, pools: Any, stages: Any, message: str
) -> None:
    """The key, what was found there, and the nearest right name."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place(here, pools, stages)
    with pytest.raises(ParamsError) as refusal:
        placed(ADDRESSES)
    assert "params/placement.yaml" in str(refusal.value)
    assert message in str(refusal.value)


def test_pools_need_a_server_that_workers_reach() -> None:
    """The server that a run starts for itself has no workers."""
    with temporary_settings({PREFECT_API_URL: None}):
        refuse_without_server({})
        with pytest.raises(ParamsError, match=r"merge@toy is placed in pool 'gpu'.*set PREF"):
            refuse_without_server({"merge@toy": ("gpu", Pool())})
