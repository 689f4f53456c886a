"""collect: run the calibration data through the checkpoints, keep statistics of activations."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(__doc__)
