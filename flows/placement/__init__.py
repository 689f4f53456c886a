"""Stages where the hardware is: Prefect's pools find the worker, DVC's remote carries the files.

`params/placement.yaml` places a stage in a work pool. The pipeline pushes what the stage reads,
starts a run of the flow `stage` in the pool, watches it, and merges the entry of `dvc.lock` that
comes back. A worker is a clone with `make worker POOL=...`: it checks the commit out, pulls, runs
the stage through DVC and pushes what that wrote.
"""
