"""fetch: bring the checkpoints of a recipe to `models/<recipe>/checkpoints/`, verified."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__, {"check": "only say what has changed upstream"})
