"""Prefect runs and schedules the stages that DVC calls stale."""
