"""Pre-train one model of the study, or go on from its last step checkpoint: `models/gauge/<name>/`."""

from pathlib import Path

from benchmarks.gauge.params import study
from tasks import scenes
from tasks.params import PrepareParams, load
from tasks.pretrain import pretrain
from tasks.storage import write_folder, write_json

MADE = Path("models/gauge")
WORK = Path(".alloy/gauge")  # step checkpoints
ARM = "specific_unseeded"


def train(name: str) -> None:
    """Pre-train a model whose experts have no common seed."""
    params = study()
    bank = scenes.load_bank(load(params.recipe, "prepare", PrepareParams).scenes)
    made = params.pretrain(name)
    model, progress = pretrain(ARM, made, bank, WORK / name, _say)
    with write_folder(MADE / name) as folder:
        model.save_pretrained(folder)
        write_json(
            folder / "pretraining.json", {"params": made.model_dump(), "losses": progress.losses}
        )
    print(f"gauge: wrote {MADE / name}, {model.num_parameters():,} parameters")


def _say(_: str, kind: str, *values: object) -> None:
    if kind == "say":
        print(f"gauge: {values[0]}", flush=True)
