"""Configurations of mergekit, translated into merges of ours.

mergekit (github.com/arcee-ai/mergekit) says in YAML what is merged; `merge_request` reads the same
file. What it means is resolved tensor by tensor, as mergekit does: filters, gradients, and settings
of models, slices and the whole by their precedence. What cannot be done is refused by name.
"""

from alloy.mergekit.translate import Translation, merge_request

__all__ = ["Translation", "merge_request"]
