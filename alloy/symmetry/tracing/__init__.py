"""From one run of a model to its symmetries: a trace, rules for its operations, spaces and kinds."""
