"""Softmax, fused attention, and rotary position embeddings (as `rotary.py` names them)."""

from alloy.symmetry.tracing.engine import Engine, merged
from alloy.symmetry.tracing.links import Rotation
from alloy.symmetry.tracing.recording.log import Call
from alloy.symmetry.tracing.rules.contractions import contract
from alloy.symmetry.tracing.rules.registry import listed_dims, rule
from alloy.symmetry.tracing.terms import Node, pin, regroup, unify


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_fused_attention_overrideable "
    "_scaled_dot_product_cudnn_attention"
)
def attention(engine: Engine, call: Call) -> None:
    """softmax(q k^T + mask) v for q [B,H,S,D], k [B,K,T,D], v [B,K,T,E]."""
    q, k, v = (call.inputs[name] for name in ("query", "key", "value"))
    mask = call.inputs.get("attn_mask", call.inputs.get("attn_bias"))
    out = call.outputs[0]
    q_dims, k_dims, v_dims = engine.get(q), engine.get(k), engine.get(v)
    heads = q_dims[1]
    if q.shape[1] != k.shape[1]:  # grouped-query: H = K x queries of a group
        pair = regroup([q_dims[1]], [k.shape[1], q.shape[1] // k.shape[1]])
        if pair is None:
            pin(q_dims[1], "query heads that do not follow the key heads")
            pin(k_dims[1], "query heads that do not follow the key heads")
        else:
            unify(pair[0], k_dims[1])
    else:
        heads = merged([q_dims[1], k_dims[1], v_dims[1]])
    batch = merged([q_dims[0], k_dims[0], v_dims[0]])
    unify(k_dims[1], v_dims[1])
    unify(k_dims[2], v_dims[2])
    if call.inputs.get("is_causal"):
        engine.pin_dims(q, [2], "order of causal attention")
        engine.pin_dims(k, [2], "order of causal attention")
    contract(engine, q, k, (3, 3), [(0, 0), (1, 1)])
    if mask is not None:
        scores = [batch, heads, q_dims[2], k_dims[2]]
        for d, size in enumerate(mask.shape[::-1]):
            if size > 1:
                merged([scores[3 - d], engine.get(mask)[-1 - d]])
    engine.mix(k, [2])
    engine.mix(v, [2])
    engine.set(out, [batch, heads, q_dims[2], v_dims[3]])
    engine.same(v, out, [(3, 3)])
    for value in call.outputs[1:]:
        known = [batch, heads, q_dims[2]]
        fits = value.shape == out.shape[:3]
        engine.set(
            value, known if fits else [Node(n, "statistics of attention") for n in value.shape]
        )


@rule("rotary")
def rotary(engine: Engine, call: Call) -> None:
    """Pairs of units of the last dim times tables of phases, perhaps reordered (see rotary.py)."""
    x, out = call.inputs["self"], call.outputs[0]
    last = len(x.shape) - 1
    dims = list(engine.get(x))
    for table, shift in zip(call.inputs["tables"], call.inputs["shifts"], strict=True):
        nodes = engine.get(table)
        for d in range(last):
            if d >= shift and table.shape[d - shift] > 1:
                dims[d] = merged([dims[d], nodes[d - shift]])
        frequencies = range(max(last - shift, 0), len(table.shape))
        engine.pin_dims(table, frequencies, "frequencies of a rotary embedding")
    engine.mix(x, [last])
    engine.set(out, dims)
    engine.link(Rotation((x, last), (out, last), *call.inputs["strides"]))


@rule("_softmax _log_softmax _safe_softmax softmax log_softmax")
def softmax(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    engine.set(call.outputs[0], engine.get(x))
    engine.mix(x, listed_dims(call.inputs["dim"], len(x.shape)))
