"""The study of distances: whether they predict how well weights merge."""
