"""The spaces of every architecture are those of theory, and the model itself confirms them.

Theory counts spaces by size. N is hidden = intermediate = sequence = vocabulary = labels, H is
heads = head width; all models have two layers.
"""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import alloy
from alloy.errors import SymmetryError
from alloy.symmetry import add_norm_matrices, fold_norms, unfold_norms
from alloy.symmetry.validate import Prober, random_weights

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
sys.modules["zoo"] = zoo
_spec.loader.exec_module(zoo)
# FLAVA and Qwen2-VL are traced by one modality, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:the example inputs reach")
N, H, CASES, build = zoo.N, zoo.H, zoo.CASES, zoo.build

ATTENTION = [H, H, H]  # heads; width of queries and keys, and of values, within each head
BLOCK = [*ATTENTION, N]  # and the neurons of the MLP
DECODER_BLOCK = [*ATTENTION, *BLOCK]  # self- and cross-attention
ENCODER = [N, *BLOCK, *BLOCK]  # the residual stream first
# 2 key heads, 2 query heads for each, values of width H; queries and keys are rotary of width H
# for each key head, and pinned where a norm with a gain stands in front of the rotation.
NORMED = [2, 2, H]
GROUPED = [*NORMED, H]
LLAMA = [N, *2 * [*GROUPED, N]]
NORMED_LLAMA = [N, *2 * [*NORMED, N]]
ALIBI = [N, *2 * [H, H, 4 * N]]  # slopes differ by head: heads are pinned, widths free per head
SWIN = [8, *2 * [2, 4, 4, 8], 16, *2 * [4, 4, 4, 16]]  # two stages: heads, widths, MLP

THEORY = {
    "bert": ENCODER,  # the MLM transform ends in the tied embedding: part of the residual stream
    "bert_classifier": [*ENCODER, N],  # the pooler
    "roberta": ENCODER,
    "distilbert": ENCODER,
    "vit": ENCODER,
    "deit": ENCODER,
    "dinov2": ENCODER,
    "dinov2_swiglu": ENCODER,
    "beit": ENCODER,
    "ast": ENCODER,
    "gpt2": ENCODER,
    "opt": ENCODER,
    "clip": [*ENCODER, *ENCODER, N],  # the space in which image and text are compared
    # SigLIP compares the text head with the vision pooling head: an attention and an MLP.
    "siglip": [*ENCODER, *ENCODER, N, *BLOCK],
    # Three towers; poolers and transforms of the heads; the contrastive space.
    "flava": [*ENCODER, *ENCODER, *ENCODER, N, N, N, N],
    "vilt": [*ENCODER, N, 2 * N],  # pooler, classifier
    "blip": [*ENCODER, N, *2 * DECODER_BLOCK],
    "whisper": [N, *ENCODER, N, *2 * DECODER_BLOCK],  # conv1
    # The grouped positional convolution cuts the residual to 4 groups of 4; two convolutions.
    "wav2vec2": [4, 4, N, N, *2 * BLOCK],
    "hubert": [4, 4, N, N, *2 * BLOCK],
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": NORMED_LLAMA,
    "phi3": LLAMA,
    "gpt_neox": [N, *2 * [H, 2, 2, H, N]],  # half of the query width is rotary, half any matrix
    "mixtral": [N, *2 * [*GROUPED, 4, N]],  # 4 experts, in any order; neurons within each
    "bloom": ALIBI,
    # One residual stream (shared embedding); heads of self-attention tied over layers by the bias.
    "t5": [N, H, H, *2 * [H, H, N], *2 * [H, H, *BLOCK]],
    "bart": [*ENCODER, *2 * DECODER_BLOCK],
    "swin": SWIN,
    "resnet": [8, 8, 8, 16, 16],  # a stage's stream, and one inner convolution in each block
    "resnet_bottleneck": [8, 16, 4, 4, 4, 4, 32, 8, 8],  # stem; stream and two inner ones a block
    "convnext": [8, 32, 32, 16, 64, 64],
    "sam": [
        8,  # Fourier features: sine and cosine halves of everything in the decoder
        N,
        *2 * [H, H, H, N],
        N,  # the image encoder (relative positions tie heads' widths), its neck
        *2 * [2, 8, 8, 2, 4, 4, N, 2, 4, 4],
        2,
        4,
        4,  # two-way transformer, last attention
        4,
        2,  # upscaling
        *4 * [N, N],
        N,
        N,  # four mask heads and the quality head, two inner layers each
    ],
    "segformer": [8, 8, 2, 4, 4, 8, N, H, H, H, N, N, N, N],  # the first: reduced keys have a space
    "mamba": [N, *2 * [N, 4, 4]],  # inner channels, rank of the step, state
    "llava": [*ENCODER, N, *LLAMA],  # projector
    "falcon_multi_query": [
        N,
        *2 * [H, H, H, N],
    ],  # one key head for all: heads, rotary, values, MLP
    "falcon_new": LLAMA,
    "xlnet": ENCODER,
    "mpnet": [N, H, *2 * [H, H, N]],  # heads tied over layers by the relative bias
    "albert": [8, *[N, *BLOCK]],  # one shared layer; factorised embedding
    "electra": [8, *ENCODER],
    "modernbert": ENCODER,
    "gemma2": LLAMA,
    "gemma3": NORMED_LLAMA,
    "cohere": LLAMA,
    "gemma": LLAMA,
    "olmo2": NORMED_LLAMA,
    "starcoder2": LLAMA,
    "qwen2_moe": [N, *2 * [*GROUPED, 4, N, N]],  # and a shared expert
    "qwen3_moe": [N, *2 * [*NORMED, 4, N]],
    "olmoe": [N, *2 * [*NORMED, 4, N]],
    "gpt_oss": [N, *2 * [*GROUPED, 4, N]],
    "gptj": [N, *2 * [H, 2, 2, H, N]],
    "codegen": [N, *2 * [H, 2, 2, H, N]],
    "mpt": ALIBI,
    "dinov3": ENCODER[1:],  # observed at its last hidden state: the stream is pinned
    "m2m100": [*2 * BLOCK, *2 * DECODER_BLOCK],  # sinusoidal positions outside the state dict
    "longt5": [N, H, H, *2 * [H, H, N], *2 * [H, H, *BLOCK]],
    "switch": [N, H, H, H, H, N, H, H, *4 * [N], H, H, *BLOCK, H, H, *ATTENTION, *4 * [N]],
    "owlvit": [*ENCODER, *ENCODER, N, N, N],
    "trocr": ENCODER,
    "pegasus": [*ENCODER, *2 * DECODER_BLOCK],
    "data2vec_text": ENCODER,
    "data2vec_vision": ENCODER,
    "bigbird": ENCODER,
    "fnet": [
        N,
        N,
        N,
    ],  # the Fourier transform pins the stream: embeddings before their projection, two MLPs
    "videomae": ENCODER[1:],  # sinusoidal positions outside the state dict pin the stream
    "glm4": [N, *2 * [2, 2, 2, 2, H, N]],  # half of the query width is not rotated
    "roformer": ENCODER,
    # Latent attention: compressed queries, heads, unrotated width, rotary key shared by all heads,
    # compressed keys and values, values; an MLP, then 2 groups of 2 experts and a shared one.
    "deepseek_v3": [N, *2 * [8, H, H, H, 8, H], N, 2, 2, N, N],
    "llama4": [N, *2 * [*GROUPED, 2, N, N]],  # 2 experts and a shared one
    "qwen2_vl": [2 * N, *2 * [2, 2, 2 * H, 2 * H, N]],  # pairs take turns at three positions
}


def sizes(spec):
    return Counter(space.size for space in spec.spaces.values())


def places(spec):
    """Each space by its axes: what it is, whatever it is called."""
    return {frozenset((a.parameter, a.dim, a.path) for a in s.axes) for s in spec.spaces.values()}


@pytest.mark.parametrize("name", THEORY)
def test_spaces_are_those_of_theory_and_random_transforms_leave_the_model_unchanged(name):
    """Number and sizes of the spaces; a random element of the whole group, float64, 1e-9."""
    model, inputs = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    spec = alloy.find_symmetries(model, inputs)
    assert sizes(spec) == Counter(THEORY[name])
    alloy.validate(model, spec, inputs, trials=1)
    assert alloy.SymmetrySpec.from_json(spec.to_json()) == spec
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


LISTED = list(THEORY)[: list(THEORY).index("falcon_multi_query")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in LISTED if "resnet" not in n and n not in ("mamba", "convnext")]
)
def test_eager_attention_has_the_same_spaces(name):
    """How attention is computed does not matter: sdpa and eager give the same axes and kinds."""
    specs = []
    for attention in ("sdpa", "eager"):
        try:
            model, inputs = build(name, attention)
        except ValueError:
            pytest.skip("one attention only")
        specs.append(alloy.find_symmetries(model, inputs))
    assert places(specs[0]) == places(specs[1])
    assert Counter(s.kind for s in specs[0].spaces.values()) == Counter(
        s.kind for s in specs[1].spaces.values()
    )


OTHERS = [name for name in CASES if name not in THEORY and name != "mobilevit"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_sound(name):
    """Whatever is claimed for a model nobody looked at is true."""
    model, inputs = build(name)
    spec = alloy.find_symmetries(model, inputs)
    assert spec.spaces
    alloy.validate(model, spec, inputs, trials=2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "orthogonal"),
        ("qwen3", "orthogonal"),
        ("phi3", "orthogonal"),
        ("mixtral", "orthogonal"),
        ("vit", "orthogonal fixing ones"),
        ("dinov2", "orthogonal fixing ones"),
        ("gpt_neox", "orthogonal fixing ones"),
    ],
)
def test_folding_keeps_the_function_and_makes_the_residual_stream_orthogonal(name, kind):
    """Gains drawn at random: outputs are equal before and after, and rotations leave them so."""
    model, inputs = build(name)
    spec = alloy.find_symmetries(model, inputs)
    stream = next(iter(spec.spaces.values()))
    assert stream.folded_kind == kind
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    folded, folded_spec = fold_norms(model, spec)
    with torch.no_grad():
        before, after = model(**inputs).logits, folded(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert folded_spec.spaces[stream.name].kind == kind
    alloy.validate(folded, folded_spec, inputs, trials=1)
    # Back again: after a rotation too, the norms have their gains and the function is the same.
    rotated = alloy.random_transforms(folded_spec, generator)
    moved = alloy.transport(folded.state_dict(), folded_spec, rotated)
    folded.load_state_dict(moved)
    with torch.no_grad():
        back = unfold_norms(folded, spec, model.state_dict())(**inputs).logits
    torch.testing.assert_close(back, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma", "vit"])
def test_unfolding_is_the_inverse_of_folding(name):
    """With the old gains every weight comes back; streams of LayerNorms lose their mean."""
    model, inputs = build(name)
    spec = alloy.find_symmetries(model, inputs)
    buffers = set(dict(model.named_buffers()))
    generator = torch.Generator().manual_seed(1)
    weights = random_weights(model.state_dict(keep_vars=True), buffers, generator)
    folded, _ = fold_norms(weights, spec)
    back = unfold_norms(folded, spec, weights)
    centred = {axis.parameter for fold in spec.folds for axis in fold.centred}
    assert bool(centred) == (name == "vit")
    for key in weights:
        if key not in centred:
            torch.testing.assert_close(back[key], weights[key], rtol=1e-12, atol=1e-12)
    gain = next(fold for fold in spec.folds if fold.gain)
    assert bool(gain.offset) == (name == "gemma")  # stores gain - 1
    assert not torch.equal(folded[gain.gain.parameter], weights[gain.gain.parameter])
    other = {key: 1.5 * value for key, value in weights.items()}  # any gains will do
    fold_again, _ = fold_norms(unfold_norms(folded, spec, other), spec)
    for key in weights:
        torch.testing.assert_close(fold_again[key], folded[key], rtol=1e-12, atol=1e-12)


def test_the_biases_of_norms_move_into_the_layers_that_read_them_and_back():
    """Exact: gains one, biases zero, the function the same; unfolding restores every weight."""
    model, inputs = build("vit")
    weights = random_weights(model.state_dict(keep_vars=True), (), torch.Generator().manual_seed(1))
    model = model.double()
    inputs = {key: value.double() for key, value in inputs.items()}
    model.load_state_dict(weights)
    spec = alloy.find_symmetries(model, inputs)
    folded, folded_spec = fold_norms(model, spec, biases=True)
    norms = [f for f in spec.folds if f.gain]
    assert len(norms) == 5
    for fold in norms:
        state = folded.state_dict()
        assert torch.equal(state[fold.gain.parameter], torch.ones(N, dtype=torch.float64))
        assert not state[fold.bias.parameter].any()
    with torch.no_grad():
        before, after = model(**inputs).logits, folded(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    alloy.validate(folded, folded_spec, inputs, trials=1)
    back = unfold_norms(folded.state_dict(), spec, weights, biases=True)
    centred = {axis.parameter for fold in spec.folds for axis in fold.centred}
    for key in weights.keys() - centred:
        torch.testing.assert_close(back[key], weights[key], rtol=1e-12, atol=1e-12)
    with pytest.raises(SymmetryError, match="is not folded: it is not zero"):
        unfold_norms(fold_norms(weights, spec)[0], spec, weights, biases=True)


def test_a_norms_bias_stays_where_a_layer_without_a_bias_reads_it():
    model, inputs = build("gpt_neox")
    spec = alloy.find_symmetries(model, inputs)
    with pytest.raises(SymmetryError, match=r"final_layer_norm.bias' has no .*: mm in lm_head"):
        fold_norms(model, spec, biases=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {}, r"needs '.*norm.weight' of shape \(16,\); given: none"),
        (lambda g: g | dict.fromkeys(g, torch.zeros(4)), r"shape \(16,\); given: \(4,\)"),
        (lambda g: g | {k: 0 * v for k, v in g.items()}, "has a zero, NaN or Inf"),
        (lambda g: g | {k: v / 0 for k, v in g.items()}, "has a zero, NaN or Inf"),
    ],
)
def test_unfolding_with_gains_that_do_not_fit_is_refused(change, message):
    model, inputs = build("llama")
    spec = alloy.find_symmetries(model, inputs)
    folded, _ = fold_norms(model.state_dict(), spec)
    gains = {f.gain.parameter: torch.full((N,), 2.0) for f in spec.folds if f.gain}
    with pytest.raises(SymmetryError, match=message):
        unfold_norms(folded, spec, change(gains))
    with pytest.raises(SymmetryError, match="is not folded: its gain is not one"):
        unfold_norms(unfold_norms(folded, spec, gains), spec, gains)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", r"ln_f.weight.*meet again \(at transformer.wte.weight"),  # tied embedding
        ("bert_classifier", "feeds a sum or another norm"),  # post-norm
        ("resnet", "no norm with a gain"),
    ],
)
def test_folding_is_refused_where_it_would_change_the_function(name, reason):
    model, inputs = build(name)
    spec = alloy.find_symmetries(model, inputs)
    with pytest.raises(SymmetryError, match=reason):
        fold_norms(model, spec)


STREAMS = {
    "bert_classifier": (
        "orthogonal fixing ones",
        5,
    ),  # post-norm: a stream from each norm to the next
    "gemma2": ("orthogonal", 5),  # one, and what each norm in front of it reads
    "gpt2": ("orthogonal fixing ones", 1),  # embedding tied to the output
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_matrix_behind_a_norm_that_writes_a_stream_makes_room_for_its_gain(name):
    """The function and all names stay; then every norm folds, and streams rotate."""
    model, inputs = build(name)
    weights = random_weights(model.state_dict(keep_vars=True), (), torch.Generator().manual_seed(0))
    model.load_state_dict(weights)
    spec = alloy.find_symmetries(model, inputs)
    with pytest.raises(SymmetryError, match="add_norm_matrices makes room"):
        fold_norms(model, spec)
    widened = add_norm_matrices(model, spec)
    assert set(model.state_dict()) < set(widened.state_dict())
    wider_spec = alloy.find_symmetries(widened, inputs)
    assert not wider_spec.unfoldable
    folded, folded_spec = fold_norms(widened, wider_spec)
    with torch.no_grad():
        logits = [m(**inputs).logits for m in (model, widened, folded)]
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-3, atol=1e-4)
    kinds = Counter(s.kind for s in folded_spec.spaces.values())
    kind, streams = STREAMS[name]
    assert kinds[kind] == streams
    alloy.validate(folded, folded_spec, inputs, trials=1)
    with pytest.raises(SymmetryError, match="no norm stands in the way"):
        add_norm_matrices(widened, wider_spec)


def test_kinds_follow_from_the_operations():
    """Signs where RMSNorm and gates allow them, matrices within heads, rotary pairs turn."""
    model, inputs = build("llama")
    kinds = {s.name: s.kind for s in alloy.find_symmetries(model, inputs).spaces.values()}
    layer = "model.layers.0"
    assert kinds["model.embed_tokens.weight[1]"] == "signed permutation"
    assert kinds[f"{layer}.mlp.gate_proj.weight[0]"] == "signed permutation"
    assert kinds[f"{layer}.self_attn.v_proj.weight[0]*1"] == "general linear"
    assert kinds[f"{layer}.self_attn.q_proj.weight[0]*0"] == "permutation"
    assert kinds[f"{layer}.self_attn.q_proj.weight[0]*2"] == "rotary"
    model, inputs = build("vit")
    spec = alloy.find_symmetries(model, inputs)
    assert Counter(s.kind for s in spec.spaces.values()) == {"permutation": 5, "general linear": 4}
    model, inputs = build("clip")
    spec = alloy.find_symmetries(model, inputs)
    assert spec.spaces["visual_projection.weight[0]"].kind == "orthogonal"


ROTARY = {
    "llama": (4, 2),  # halves of the head
    "qwen2": (4, 2),
    "phi3": (4, 2),  # one fused matrix
    "falcon_multi_query": (4, 2),  # one key head
    "modernbert": (4, 2),
    "dinov3": (4, 2),  # image patches alone are rotated
    "gpt_neox": (2, 1),  # a part of the head
    "gptj": (2, 1),
    "cohere": (4, 1),  # neighbours
    "roformer": (4, 1),  # tables in the state dict
    "deepseek_v3": (4, 1),  # neighbours, laid out as halves after they were turned
    "qwen2_vl": (8, 4),
}


@pytest.mark.parametrize("name", ROTARY)
def test_queries_and_keys_under_rotary_positions_turn_and_scale_by_pairs(name):
    """One rotary space a layer, per key head; queries take M, keys its inverse transpose."""
    model, inputs = build(name)
    spec = alloy.find_symmetries(model, inputs)
    spaces = [s for s in spec.spaces.values() if s.kind == "rotary"]
    assert [(s.size, s.pair_stride) for s in spaces] == 2 * [ROTARY[name]]
    for space in spaces:
        assert {axis.variance for axis in space.axes} == {1, -1}
        assert bool(space.depends_on) == (name not in ("falcon_multi_query", "deepseek_v3"))
    alone = {s.name: alloy.random_transforms(spec, torch.Generator())[s.name] for s in spaces}
    prober = Prober(model, spec, inputs)
    assert prober.change(alone) < 1e-9


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "olmo2"])
def test_a_gain_between_the_units_of_a_rotary_pair_leaves_no_rotation(name):
    """Norms of queries and keys with a gain: turning a pair first is not turning it after."""
    model, inputs = build(name)
    spec = alloy.find_symmetries(model, inputs)
    assert not any("rotary" in s.kind for s in spec.spaces.values())
    reasons = {p.reason for p in spec.pinned if "q_norm" in p.axis.parameter}
    assert reasons == {
        "rotary pairs, scaled by a gain that differs between the two units of a pair"
    }


def test_a_norm_without_a_gain_leaves_rotations_without_scales():
    """Llama 4 divides rotated queries and keys by their lengths."""
    model, inputs = build("llama4")
    spec = alloy.find_symmetries(model, inputs)
    assert [s.kind for s in spec.spaces.values() if s.pair_stride] == 2 * ["orthogonal rotary"]


def test_experts_of_a_mixture_may_change_order_with_their_neurons():
    """Expert order is a space; neurons depend on their expert, as widths do on their head."""
    model, inputs = build("mixtral")
    spec = alloy.find_symmetries(model, inputs)
    experts = next(
        s
        for s in spec.spaces.values()
        if any("gate.weight" in a.parameter for a in s.axes) and s.size == 4 and not s.depends_on
    )
    neurons = [s for s in spec.spaces.values() if s.depends_on == (experts.name,)]
    assert [s.size for s in neurons] == [N]
    assert {a.parameter.rsplit(".", 1)[-1] for a in experts.axes} == {
        "weight",
        "gate_up_proj",
        "down_proj",
    }


def test_what_other_inputs_reach_is_found_by_joining_examples():
    """Mask tokens are reached with a mask only; two examples give one spec for both paths."""
    model, plain = build("dinov2")
    masked = {**plain, "bool_masked_pos": torch.arange(16).expand(2, -1) % 3 == 0}
    alone = alloy.find_symmetries(model, plain)
    assert alone.unused == ("dinov2.embeddings.mask_token",)

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values, bool_masked_pos=None):
            hidden = self.model.dinov2(pixel_values, bool_masked_pos=bool_masked_pos)
            return self.model.classifier(torch.cat([hidden[0][:, 0], hidden[0][:, 1:].mean(1)], 1))

    joined = alloy.find_symmetries(Masked().eval(), [plain, masked])
    assert not joined.unused
    alloy.validate(Masked().eval(), joined, [plain, masked])


@pytest.mark.parametrize(
    "sharing", ["none", "custom_attention", "custom_ffn", "custom_norms", "all"]
)
def test_the_modality_transformer_in_every_sharing(sharing):
    """Both passes, all heads: a stream; attentions and MLPs of each expert; heads; embeddings."""
    from alloy.modality import ModalityConfig, ModalityModel

    config = ModalityConfig(
        sharing=sharing,
        hidden_size=N,
        num_hidden_layers=3,
        num_joint_layers=1,
        intermediate_size=N,
        num_attention_heads=H,
        embedding_size=N,
        image_size=16,
        patch_size=4,
        vocab_size=N,
        max_position_embeddings=N,
        num_answers=N,
        num_segment_classes=N,
    )
    torch.manual_seed(0)
    model = ModalityModel(config).eval()
    dual = {"pixel_values": zoo.noise(2, 3, 16, 16), "input_ids": zoo.ids()}
    other = {"pixel_values": zoo.noise(2, 3, 16, 16, seed=1), "input_ids": zoo.ids(N - 3)}

    def heads(output):
        both = output.image_embeddings @ output.text_embeddings.T
        return both, output.answer_logits, output.segment_logits, output.masked_word_logits

    spec = alloy.find_symmetries(model, [dual, other], observe=heads)
    attentions = (
        7 if sharing in ("none", "custom_attention") else 3
    )  # 2 + 2 + 3 experts, or one each
    mlps = 7 if sharing in ("none", "custom_ffn") else 3
    # Stream, contrastive space, pooler, word transform; the answer head is twice as wide.
    expected = [N, N, N, N, 2 * N, *attentions * ATTENTION, *mlps * [N]]
    assert sizes(spec) == Counter(expected)
    alloy.validate(model, spec, [dual, other], observe=heads, trials=1)
    # The text embeddings' norm writes the stream; norms of several modalities share their readers.
    (gains,) = spec.unfolded.values()
    assert "text_embeddings.norm.weight" in gains
    assert len(gains) == (15 if sharing == "custom_norms" else 1)
    if sharing not in ("all", "custom_norms"):
        return
    wider = add_norm_matrices(model, spec)
    wider_spec = alloy.find_symmetries(wider, [dual, other], observe=heads)
    folded, folded_spec = fold_norms(wider, wider_spec)
    rotating = [s.size for s in folded_spec.spaces.values() if s.kind == "orthogonal fixing ones"]
    assert rotating == [N, N]  # the stream, and the embeddings in front of their norm
    alloy.validate(folded, folded_spec, [dual, other], observe=heads, trials=1)
