"""The gauge of a traced model: RMSNorm, rotary positions, grouped heads, gated MLP."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from alloy.gauge import search_gauge
from alloy.statistics.moments import Gram
from alloy.symmetry import find_symmetries, fold_norms, transport


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def run(weights, ids):
    """Logits, and the Grams of the blocks' linear layers."""
    model, grams = llama(0), {}
    model.load_state_dict(weights)

    def see(name, x_BSD):
        x_ND = x_BSD.flatten(0, 1)
        grams[f"{name}.weight"] = Gram.zero(x_ND.shape[1]).update(x_ND)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in name:
            layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
    return model(input_ids=ids).logits, grams


def test_two_llamas_find_a_gauge_that_leaves_their_functions():
    ids = torch.randint(0, 40, (8, 12), generator=torch.Generator().manual_seed(0))
    first = llama(1)
    spec = find_symmetries(first, {"input_ids": ids})
    models = [fold_norms(dict(m.state_dict()), spec) for m in (first, llama(2))]
    weights, folded = [w for w, _ in models], models[0][1]
    before = [run(w, ids) for w in weights]
    gauge = search_gauge(weights, folded, [g for _, g in before], steps=10, max_rounds=1)
    assert gauge.error_after < 0.7 * gauge.error_before
    turned = {n for n, t in gauge.transforms[1].items() if t.matrix is not None}
    kinds = {folded.spaces[name].kind for name in turned}
    assert kinds == {"orthogonal", "general linear", "rotary"}
    moved = transport(weights[1], folded, gauge.transforms[1])
    torch.testing.assert_close(run(moved, ids)[0], before[1][0], atol=1e-5, rtol=1e-5)
