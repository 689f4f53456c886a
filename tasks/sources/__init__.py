"""Where checkpoints come from and go to: hub, buckets, the registry, folders."""
