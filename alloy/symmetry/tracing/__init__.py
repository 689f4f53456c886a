"""From one run of a model to its symmetries: a log, rules for its operations, spaces, kinds."""
