"""ship: write the result to a bucket, so that a reader sees the old model or the new one."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__)
