"""Find, check and apply the symmetries of any model that PyTorch can run."""
