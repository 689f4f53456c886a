"""Files of a checkpoint wherever they lie: on this disk, or elsewhere and read by ranges.

A file elsewhere is a path here all the same: a stub of its header alone. Whatever does not know of
it takes the stub for a truncated file and refuses it.
"""
