"""Default outputs of a model: the tensors that must not change."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Observe = Callable[[Any], Any]
"""From a model's output to the tensors that count."""


def observe_outputs(output: Any) -> Any:
    """The tensors of a model's output that count by default.

    All of them, except internal states: of an output with heads (`logits`, `pred_boxes`) the hidden
    states, attentions, caches and pooled features are internal, and so are embeddings that the
    output also compares (`logits_per_image`); an output of nothing else (a bare encoder) is
    observed at its last hidden state and pooled features.
    """
    if not isinstance(output, Mapping):
        return _floating(output)
    state = {
        key: value
        for key, value in output.items()
        if not any(
            word in key for word in ("past_key", "attentions", "cache", "mems", "_state_dict")
        )
        and key not in ("hidden_states", "state", "rnn_state")
    }
    internal = ["hidden_state", "_states", "pooler", "embeds", "pooled"]
    if any("logits_per" in key for key in state):
        internal.append("embeddings")
    heads = {
        key: value
        for key, value in state.items()
        if not any(word in key for word in internal)
        and not _is_of_a_part(key, value)
        and _floating(value)
    }
    return _floating(heads or {k: v for k, v in state.items() if "hidden_states" not in k})


def _is_of_a_part(key: str, value: Any) -> bool:
    """Tell the outputs of a part of the model from heads such as `prediction_outputs`."""
    if "_outputs" in key:
        return not isinstance(value, Tensor)
    return key.endswith("_output") and key != "prediction_output"


def _floating(output: Any) -> list[Tensor]:
    return [
        t
        for t in tree_leaves(output)
        if isinstance(t, Tensor) and (t.dtype.is_floating_point or t.dtype.is_complex)
    ]
