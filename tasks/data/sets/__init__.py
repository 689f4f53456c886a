"""Data sets as people have them on disk, each by the layout of its authors' archive.

A *set* lies under `data/raw/<name>/`. Its *reader* streams *rows* of one *kind* (captions,
questions, pairs, maps, classes, texts), a split at a time, with references to images, never their
pixels. `stored` keeps rows as memory-mapped Arrow files, `images` decodes them when they are
needed.

    source = catalogue.open_set("vqav2", Path("data/raw/vqav2"))
    for row in source.rows("train"):
        ...
"""
