"""One module per pipeline stage: read files, call alloy, write files."""
