"""Stages for the experts of one modality transformer."""
