"""register: record the result and its lineage in MLflow, as a challenger."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__)
