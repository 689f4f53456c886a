"""finetune: train the result, and arms to compare it with, briefly on the benchmarks."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__)
