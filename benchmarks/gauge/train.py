"""Pre-training of one model of the study, from its last step checkpoint if there is one."""

from pathlib import Path

from benchmarks.gauge.params import study
from tasks.experts.pretrain import FROM_SEED, load_corpus, pretrain
from tasks.storage import write_folder, write_json

MADE = Path("models/gauge")
WORK = Path(".alloy/gauge")
"""Folder of step checkpoints, so that a run that was stopped goes on."""


def train(name: str) -> None:
    """Pre-train a model into `models/gauge/<name>`, after the seed of its experts if it has one."""
    params = study()
    arm, made = params.pretrain(name)
    corpus = load_corpus(made)
    if arm in FROM_SEED:
        pretrain("seed", made, corpus, WORK / name, _say)
    model, progress = pretrain(arm, made, corpus, WORK / name, _say)
    with write_folder(MADE / name) as folder:
        model.save_pretrained(folder)
        facts = {"arm": arm, "params": made.model_dump(), "losses": progress.losses}
        write_json(folder / "pretraining.json", facts)
    print(f"gauge: wrote {MADE / name}, {model.num_parameters():,} parameters")


def _say(_: str, kind: str, *values: object) -> None:
    if kind == "say":
        print(f"gauge: {values[0]}", flush=True)
