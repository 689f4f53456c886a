"""Carry out a plan: steps, the workers that take them, compiled kernels, files that grow."""
