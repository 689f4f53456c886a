"""align: bring the units of the members together, `models/<recipe>/transforms/`."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__)
