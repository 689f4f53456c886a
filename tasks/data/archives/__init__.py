"""Readers of data sets, each by the layout that its authors' archive unpacks to.

A set lies under `data/raw/<name>/`. Its reader says what is missing and who has it, and streams
*rows* (`tasks.data.sets.rows`) a split at a time, with references to images, never their pixels.

    source = catalogue.open_set("vqav2", Path("data/raw/vqav2"))
    for row in source.rows("train"):
        ...
"""
