"""Prepared data sets: rows in memory-mapped Arrow files, which become tensors when taken.

A row has one of few *kinds* (captions, questions, pairs, maps, classes, texts), whatever archive it
came from (`tasks.data.archives`). `stored` writes rows as they stream by and notes their faults,
`description` is what a prepared set says of itself, `splits` makes batches, `loader` makes them in
workers ahead of time.
"""
