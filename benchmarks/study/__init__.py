"""Initialisation, mechanism and architecture of modality merging, over seeds (docs/log.md)."""
