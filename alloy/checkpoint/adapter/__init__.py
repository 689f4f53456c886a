"""Adapters of PEFT on a checkpoint: what they change, and what the changed tensors hold."""
