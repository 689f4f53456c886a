"""merge: merge the members in every way that the recipe names, `models/<recipe>/arms/`."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__)
