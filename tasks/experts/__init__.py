"""What the stages do for the experts of one modality transformer."""
