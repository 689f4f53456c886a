"""Sources and targets of checkpoints: hub, buckets, the registry, folders."""
