"""choose: make the arm that the recipe is about its model, `models/<recipe>/merged/`."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__)
