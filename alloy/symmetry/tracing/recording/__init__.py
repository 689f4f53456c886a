"""From a model to a log: run it once, and write down what every operation did."""
