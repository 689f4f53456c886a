"""Layers of a merged model refitted to its parents: least squares, sensitivities, repair."""
