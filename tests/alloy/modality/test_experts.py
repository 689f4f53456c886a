"""Laws of taking experts out of a checkpoint and putting them back."""

import pytest
import torch

from alloy.modality import (
    EXPERT_PARTS,
    ModalityModel,
    agnostic_config,
    copy_to_experts,
    join,
    shared_weights,
    split_experts,
)

SHARINGS = list(EXPERT_PARTS)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_joining_what_was_split_is_the_checkpoint(sharing, model):
    specific = model(sharing=sharing)
    weights = specific.state_dict()
    experts = split_experts(weights, specific.config)
    joined = join(experts, shared_weights(weights, specific.config), specific.config)
    assert joined.keys() == weights.keys()
    assert all(joined[name] is weights[name] for name in weights)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_experts_bear_the_agnostic_models_names(sharing, model):
    """Experts with the shared weights are an agnostic model; vl lacks the lower blocks."""
    specific = model(sharing=sharing)
    experts = split_experts(specific.state_dict(), specific.config)
    shared = shared_weights(specific.state_dict(), specific.config)
    agnostic = ModalityModel(agnostic_config(specific.config))
    for modality in ("v", "l"):
        agnostic.load_state_dict({**shared, **experts[modality]}, strict=True)
    joint = {name for name in experts["v"] if name.startswith("blocks.2.")}
    assert experts["vl"].keys() == joint
    assert specific.config.sharing == sharing  # the config was not changed in place


@pytest.mark.parametrize("sharing", SHARINGS)
def test_copies_of_a_seed_compute_what_it_computes(sharing, model, config, inputs):
    """The modality-specific model whose experts are the seed's copies is the seed's function."""
    seed = model()
    specific = ModalityModel(config(sharing=sharing)).eval()
    copied = copy_to_experts(seed.state_dict(), specific.config)
    specific.load_state_dict(copied, strict=True)
    for name, output in seed(**inputs).items():
        assert torch.equal(output, specific(**inputs)[name]), name


def test_copies_share_no_memory(model, config):
    """Changing one expert changes neither the others nor the seed."""
    seed = model().state_dict()
    copied = copy_to_experts(seed, config(sharing="none"))
    copied["blocks.0.ffn.v.fc1.weight"].zero_()
    assert copied["blocks.0.ffn.l.fc1.weight"].any()
    assert seed["blocks.0.ffn.fc1.weight"].any()


def test_weights_of_another_shape_are_refused(model, config):
    """A missing or surplus expert, or a config of another sharing, is named."""
    specific = model(sharing="none")
    weights = specific.state_dict()
    with pytest.raises(ValueError, match=r"not those of sharing 'custom_ffn'.*unexpected experts"):
        split_experts(weights, config(sharing="custom_ffn"))
    del weights["blocks.2.norm1.vl.weight"], weights["blocks.2.norm1.vl.bias"]
    with pytest.raises(ValueError, match=r"missing experts \[\(2, 'norm1', 'vl'\)\]"):
        shared_weights(weights, specific.config)
    with pytest.raises(ValueError, match=r"'norm\.weight' of modality 'v' is no part of a block"):
        join({"v": {"norm.weight": torch.ones(1)}}, {}, specific.config)
