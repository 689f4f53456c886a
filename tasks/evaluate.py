"""evaluate: measure every model of a recipe and write the report, `reports/<recipe>/`."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__)
