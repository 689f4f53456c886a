"""A life of champions, in a real MLflow registry without Prefect."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from tasks.registry import champions, tracking
from tasks.registry.champions import Outcome, RefusedError, directly, promote, rollback

NAME = "toy-model"
REPOSITORY = Path(__file__).parents[3]
DATA = {f"vqa/{split}.safetensors": f"digest of {split}" for split in ("validation", "test")}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace with gates and an MLflow database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    gates = {
        "split": "validation",
        "model": "finetuned",
        "benchmarks": {"vqa": "accuracy"},
        "minimal_gain": 1.0,
        "maximal_regression": 2.0,
    }
    recipe = yaml.safe_load((REPOSITORY / "params" / "modality.yaml").read_text())
    for file, content in {
        "recipes": {"recipes": ["toy"]},
        "toy": recipe | {"register": {"name": NAME, "model": "finetuned"}},
        "promote": {"gates": {"toy": gates}},
    }.items():
        path = tmp_path / f"params/{file}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))


def register(score: float, data: dict[str, str] = DATA, values: np.ndarray | None = None) -> None:
    """Leave what `tasks.registry.register` leaves, without a model."""
    with tracking.run("toy", "result") as log:
        log.values(tracking.LINEAGE, {"data": data})
        for split, shift in (("validation", 0.0), ("test", -1.0)):
            log.metrics({f"{split}/finetuned/vqa/accuracy": score + shift})
            log.metrics({f"{split}/finetuned/vqa/accuracy_standard_error": 1.0})
        if values is not None:
            file = Path("examples.safetensors")
            save_file({"validation/finetuned/vqa/accuracy": values}, file)
            log.file(file)
    client = tracking.connect()
    tracking._create_registered_model(client, NAME)
    version = client.create_model_version(NAME, "file:///nowhere", log.run_id).version
    tracking.move_alias(NAME, "challenger", str(version))


def champion() -> str | None:
    found = tracking.aliased(NAME, "champion")
    return found and found.number


def promoted(**arguments) -> Outcome:
    return promote("toy", directly, **arguments)


def test_a_life_of_champions(registry) -> None:
    """Promoted on validation data, refused, promoted regardless, rolled back to the last one."""
    with pytest.raises(RefusedError, match="no registered model 'toy-model'; `register` makes it"):
        promoted()
    register(50)
    assert promoted().message == "toy-model version 1 is the champion: there is no champion yet"
    assert promoted().message == "toy-model version 1 is the champion already"

    register(50.5)
    assert "version 2 stays challenger: the mean changes by +0.50 = +0.4" in promoted().message
    assert champion() == "1"

    register(60)
    assert "dry run: toy-model version 3 would be" in promoted(dry_run=True).message
    assert champion() == "1"
    outcome = promoted()
    assert "version 3 is the champion: the mean changes by +10.00" in outcome.message
    assert outcome.decision is not None
    assert [row.challenger.value for row in outcome.decision.record] == [59.0]  # of test data
    assert champion() == "3"

    register(99, {**DATA, "vqa/validation.safetensors": "other digest"})
    with pytest.raises(RefusedError, match="measured on different data: vqa"):
        promoted()
    assert champion() == "3"
    assert "regardless of the gates: new data" in promoted(regardless="new data").message
    assert champion() == "4"

    back = rollback("toy", directly).message
    assert "version 4 was rolled back; version 3 is the champion again" in back
    assert "it was rolled back" in promoted().message  # a schedule does not bring it back
    assert champion() == "3"
    assert "version 1 is the champion again" in rollback("toy", directly).message
    with pytest.raises(RefusedError, match="version 1 is the only champion so far"):
        rollback("toy", directly)
    assert "no version is champion" in rollback("toy", directly, dry_run=True).message
    assert champion() == "1"
    asked = []
    rollback("toy", directly, confirm=lambda question: not asked.append(question))
    assert champion() is None
    assert len(asked) == 1
    with pytest.raises(RefusedError, match="nothing to roll back"):
        rollback("toy", directly)
    lines = champions.history("toy").splitlines()
    assert len(lines) == 2 + 4
    assert "regardless of the gates: new data" in lines[2]


def test_values_by_example_make_a_small_gain_count(registry) -> None:
    """Two models that err on the same examples differ by more than their own errors say."""
    right = np.tile(np.array([100.0, 0.0], dtype=np.float32), 500)
    better = right.copy()
    better[1:31:2] = 100.0  # 15 examples more, and none less
    register(50, values=right)
    promoted()
    register(51.5, values=better)
    outcome = promoted()
    assert "is the champion: the mean changes by +1.50 = +3.9 standard errors" in outcome.message
    assert outcome.decision is not None
    assert outcome.decision.comparisons[0].is_paired
    assert not outcome.decision.record[0].is_paired
