"""prepare: write the calibration data and the benchmarks of a recipe, `data/<recipe>/`."""

from tasks.command import run_stage

if __name__ == "__main__":
    run_stage(
        __doc__,
        {
            "show": "draw a sheet of examples instead of writing the data",
            "check": "only say what of each data set is there, and who has the rest",
        },
    )
