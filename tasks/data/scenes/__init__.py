"""Scenes composed from real drawings and real handwriting, on the fly.

A *concept* is what a scene can show: 30 families of OpenMoji drawings and the ten digits. A
*drawing* is one real instance of a concept: a glyph of the OpenMoji font (skin tones, genders,
colours and poses make several a concept) or one writer's digit of MNIST. A *cell* is a drawing
turned, scaled and shifted a little; the *bank* holds the cells of every concept, and no drawing is
in two splits. A *scene* is a 2x2 grid of two to four cells on a noisy background. The set of its
concepts decides which split a scene belongs to, so validation and test scenes show unseen drawings
in unseen combinations.

    bank = load_bank(params)                          # 5 s the first time, then read from
    data/cells scenes = SceneGenerator(bank, "train", seed=0)
    batch = scenes.batch(64, index=step)              # equal (seed, split, index): equal bytes

`packages` reads what packages carry, `drawings` has the concepts and their drawings, `bank` the
cells, `words` the vocabulary, `arrangement` what a scene shows, `generator` its pixels and texts.

Shapes: N scenes, S side of a scene in pixels, P side of a cell, C concepts, V cells a concept,
T tokens, G cells a scene (4). Pixels are uint8 [N, 3, S, S].
"""
