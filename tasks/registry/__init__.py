"""MLflow: runs, registered models, what is served, what is promoted."""
