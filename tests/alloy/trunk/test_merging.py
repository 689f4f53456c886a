"""The trunk's members are one set of parameters, and what they computed is kept where it can be."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import alloy
from alloy.errors import GaugeError, MergeError
from alloy.modality.sharing import Sharing
from alloy.trunk import Member, merge_trunk, plan_trunk
from alloy.trunk.members import Part
from alloy.trunk.passes import answers_of, masks_of, refuse_no_rows

LAYERS = ("vision_model.encoder.layers", "text_model.encoder.layers")
TOWERS = {
    "siglip": LAYERS,
    "clip": LAYERS,
    "flava": ("image_model.encoder.layer", "text_model.encoder.layer"),
    "whisper": ("model.encoder.layers", "model.decoder.layers"),
}
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
QUICK = {"steps": 4, "max_rounds": 1, "starts": ["opposed axes"]}


@torch.no_grad()
def answers(model, batch):
    return answers_of(model(**batch), batch)


def largest_change(ours, theirs):
    return max(float((a - b).abs().max() / b.std()) for a, b in zip(ours, theirs, strict=True))


def towers(kind):
    return dict(zip(("image", "text"), TOWERS[kind], strict=True))


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind == "flava" else ()) for kind in TOWERS],
)
def test_turned_models_compute_what_they_computed(kind, tiny, pairs):
    """Streams, heads and neurons of a member move; all that touches them follows."""
    model, batch = tiny(kind), pairs(kind)
    before = answers(model, batch)
    plan = plan_trunk(model, towers(kind), batch, turn=True)
    trunk = merge_trunk(plan, [batch], method="average", gauge=QUICK)
    assert largest_change(answers(trunk.turned["model"], batch), before) < 1e-4
    assert trunk.gauge.error_after < trunk.gauge.error_before
    moved = max(
        float((t.as_matrix() - torch.eye(t.size)).abs().max())
        for own in trunk.gauge.transforms
        for t in own.values()
    )
    assert moved > 0.1  # something turned


@pytest.mark.slow
def test_post_norm_towers_turn_at_the_price_of_matrices():
    """BERT's norms write into its stream: refused, or exact with a matrix behind each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, vocab_size=30, max_position_embeddings=8)
    models = {name: BertModel(config, add_pooling_layer=False).eval() for name in ("a", "b")}
    batch = {"input_ids": torch.randint(2, 30, (8, 6))}
    members = {name: Member(part="encoder.layer", checkpoint=name) for name in models}
    with pytest.raises(MergeError, match="norm_matrices=True puts a matrix behind each norm"):
        plan_trunk(models, members, batch, turn=True)
    plan = plan_trunk(models, members, batch, turn=True, norm_matrices=True)
    trunk = merge_trunk(plan, [batch], gauge=QUICK)
    for name, model in models.items():
        change = largest_change(answers(trunk.turned[name], batch), answers(model, batch))
        assert change < 1e-4
    assert sum(plan.turning[name].widths() != [] for name in models) == 1


def _llama(**changes):
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=40, **changes)
    return LlamaForCausalLM(config)


def _qwen():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=6, vocab_size=40))


def _dinov2():
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    config = Dinov2Config(**sizes, mlp_ratio=2, image_size=12, patch_size=4, layerscale_value=0.7)
    return Dinov2Model(config)


OF_TWO = {
    "gated, causal, rotary": (_llama, "model.layers", []),
    "tied embeddings": (lambda: _llama(tie_word_embeddings=True), "model.layers", [24]),
    "norms within heads": (_qwen, "model.layers", []),
    "LayerScale, states as outputs": (_dinov2, "encoder.layer", [24]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_TWO)
def test_members_of_two_models_turn_exactly(case):
    """Whatever is in a block, one model's stream turns beside the other's."""
    make, part, matrices = OF_TWO[case]
    torch.manual_seed(0)
    models = {name: make().eval() for name in ("a", "b")}
    for parameter in (p for model in models.values() for p in model.parameters()):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    batch = {"input_ids": torch.randint(2, 40, (6, 8))}
    if case.startswith("Layer"):
        batch = {"pixel_values": torch.randn(6, 3, 12, 12)}
    members = {name: Member(part=part, checkpoint=name) for name in models}
    plan = plan_trunk(models, members, batch, turn=True)
    trunk = merge_trunk(plan, [batch], method="average", gauge=QUICK)
    for name, model in models.items():
        assert largest_change(answers(trunk.turned[name], batch), answers(model, batch)) < 1e-4
    assert trunk.gauge.error_after < trunk.gauge.error_before
    assert [w for t in plan.turning.values() for w in t.widths()] == matrices


def twins(tiny):
    """A model whose towers' blocks are the same function, by the same weights."""
    model = tiny("siglip")
    with torch.no_grad():
        image, text = (model.get_submodule(part) for part in LAYERS)
        text.load_state_dict(image.state_dict())
    return model


@pytest.mark.parametrize("method", ["average", "regmean", "sequential"])
def test_equal_towers_merge_to_themselves(method, tiny, pairs):
    model, batch = twins(tiny), pairs("siglip")
    trunk = merge_trunk(plan_trunk(model, towers("siglip"), batch), [batch], method=method)
    assert largest_change(answers(trunk.model, batch), answers(model, batch)) < 1e-4


def test_a_merge_that_is_fitted_keeps_more(tiny, pairs):
    """Least squares on the merged model's own inputs beats the average, on data it has not seen."""
    model, batches = tiny("siglip"), [pairs("siglip", 64, seed) for seed in (1, 2)]
    plan, unseen = plan_trunk(model, towers("siglip"), batches[0]), pairs("siglip", 64, 3)

    def error(method):
        trunk = merge_trunk(plan, batches, method=method)
        found = zip(answers(trunk.model, unseen), answers(model, unseen), strict=True)
        return sum(float((a - b).square().mean() / b.var()) for a, b in found)

    assert error("sequential") < 0.7 * error("average")


@pytest.mark.parametrize("weigh", [False, "gauge"])
def test_errors_may_count_alike(weigh, tiny, pairs):
    """The fit needs no sensitivities, and neither does the search."""
    model, batch = tiny("siglip"), pairs("siglip", 24)
    plan = plan_trunk(model, towers("siglip"), batch, turn=True)
    trunk = merge_trunk(plan, [batch], gauge=QUICK, weigh=weigh)
    average = merge_trunk(plan, [batch], method="average")
    ours, theirs = (answers(t.model, batch) for t in (trunk, average))
    assert not torch.equal(ours[0], theirs[0])
    assert all(answer.isfinite().all() for answer in ours)


def test_the_models_given_stay_as_they_are(tiny, pairs):
    model, batch = tiny("clip"), pairs("clip")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = plan_trunk(model, towers("clip"), batch, turn=True)
    merge_trunk(plan, [batch], gauge=QUICK)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert Sharing.of(model.config) is None


def test_neighbouring_layers_become_one(tiny, pairs):
    """Members may be blocks of one tower: they share a stream, so only what is inside turns."""
    model, batch = tiny("siglip", vision={"num_hidden_layers": 3}), pairs("siglip")
    plan = plan_trunk(model, {"first": f"{LAYERS[0]}.1", "second": f"{LAYERS[0]}.2"}, batch)
    fixed, _ = plan.still()
    trunk = merge_trunk(plan, [batch], gauge=QUICK)
    first, second = trunk.model.get_submodule(LAYERS[0])[1:]
    assert first.mlp.fc1.weight is second.mlp.fc1.weight
    assert len(fixed) == 1
    assert plan.spec.spaces[fixed[0]].size == 24


def test_members_of_two_checkpoints(tiny, pairs):
    """The result is the first one's class; what the recipe says comes from the other."""
    models = {"one": tiny("siglip", 0), "two": tiny("siglip", 5)}
    image = Member(part=LAYERS[0], checkpoint="one")
    text = Member(part=LAYERS[1], checkpoint="two")
    batch = pairs("siglip")
    plan = plan_trunk(models, {"image": image, "text": text}, batch)
    trunk = merge_trunk(
        plan, [batch], method="regmean", take={"text_model.*": "two", "logit_*": "two"}
    )
    assert type(trunk.model) is type(models["one"])
    own = trunk.model.state_dict()
    assert torch.equal(own["logit_scale"], models["two"].state_dict()["logit_scale"])
    ours, theirs = (trunk.models[name].get_text_features for name in ("one", "two"))
    words = {"input_ids": batch["input_ids"]}
    assert torch.equal(ours(**words).pooler_output, theirs(**words).pooler_output)
    blocks = [trunk.model.get_submodule(part)[0] for part in LAYERS]
    assert blocks[0].mlp.fc1.weight is blocks[1].mlp.fc1.weight


REFUSED = {
    "method": ({"method": "sequentail"}, "did you mean 'sequential'"),
    "no data": ({"batches": []}, "needs calibration data"),
    "take of nobody": ({"take": {"text_model.*": "three"}}, "of 'three'"),
    "take of nothing": ({"take": {"speech_model.*": "model"}}, "fits no weight"),
    "a setting of no gauge": ({"gauge": {"stepz": 2}}, "gauge: 'stepz': did you mean 'steps'"),
    "fewer steps than none": ({"gauge": {"steps": -2}}, "steps=-2: it must not be negative"),
    "a gauge in words": ({"gauge": "steps"}, "give True, False or settings"),
    "weighed by nothing": ({"weigh": "gauges"}, "choose one of .True, False, 'gauge'"),
    "gauge unfolded": ({"gauge": True, "fold": False}, "folded norms"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_merges_are_refused(case, tiny, pairs):
    options, reason = REFUSED[case]
    batch = pairs("siglip")
    plan = plan_trunk(tiny("siglip"), towers("siglip"), batch)
    with pytest.raises((MergeError, GaugeError), match=reason):
        merge_trunk(plan, **{"batches": [batch], **options})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["vision_model.encoder.layers.0.mlp.fc1.weight", "logit_scale"])
def test_weights_that_are_no_numbers_are_refused(name, value, tiny, pairs):
    """Wherever they are: in the trunk or beside it."""
    model, batch = tiny("siglip"), pairs("siglip")
    plan = plan_trunk(model, towers("siglip"), batch)
    with torch.no_grad():
        model.get_parameter(name).flatten()[0] = value
    with pytest.raises(MergeError, match=f"{name} of checkpoint 'model' is NaN or infinite"):
        merge_trunk(plan, method="average")


def test_padding_counts_for_the_part_that_reads_it(tiny, pairs):
    """Texts are as long as images have patches; only the text tower's tokens are masked."""
    model, batch = tiny("clip"), pairs("clip")
    batch["input_ids"] = torch.randint(3, 50, (6, 10))  # 9 patches and the class token
    batch["attention_mask"] = torch.ones(6, 10, dtype=torch.long)
    plan = plan_trunk(model, towers("clip"), batch)
    assert masks_of(model, list(plan.parts.values()), batch) == {
        "image": (), "text": ("attention_mask",),
    }  # fmt: skip


def test_batches_without_rows_are_refused(tiny, pairs):
    """Of whichever batch; a tensor that is empty otherwise has rows."""
    model, batch = tiny("clip"), pairs("clip")
    plan = plan_trunk(model, towers("clip"), batch)
    empty = {name: tensor[:0] for name, tensor in batch.items()}
    message = "batch {} of checkpoint 'model': .* has no rows .*at least one row"
    for i, batches in enumerate(([empty, batch], [batch, empty])):
        with pytest.raises(MergeError, match=message.format(i)):
            merge_trunk(plan, batches, method="average")
    refuse_no_rows("model", [{"x": torch.zeros(2, 0), "scale": torch.tensor(1.0)}])


def test_a_batch_with_masks_that_reaches_no_block_of_a_part_is_refused():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("image", "text")})
    parts = [Part(name, "model", (name,), {}) for name in model]
    model.forward = lambda x, attention_mask: model["text"](x)
    with pytest.raises(MergeError, match="attention_mask, x reaches no block of image: give"):
        masks_of(model, parts, {"x": torch.ones(1, 3, 2), "attention_mask": torch.ones(1, 3)})


def test_a_saved_trunk_is_stored_once_and_stays_one(tmp_path, tiny, pairs):
    """The file holds each shared tensor once; loading and training keep the sharing."""
    model, batch = tiny("whisper"), pairs("whisper")
    plan = plan_trunk(model, towers("whisper"), batch, turn=True)
    trunk = merge_trunk(plan, [batch], method="average")
    trunk.save(tmp_path / "merged")
    loaded = alloy.load_shared(tmp_path / "merged")
    assert type(loaded) is type(model)
    assert largest_change(answers(loaded, batch), answers(trunk.model, batch)) == 0
    assert sum(p.numel() for p in loaded.parameters()) == plan.num_parameters[1]
    size = (tmp_path / "merged" / "model.safetensors").stat().st_size
    buffers = sum(b.numel() for b in loaded.buffers())
    assert size < 4 * (plan.num_parameters[1] + buffers) + 40_000

    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(**batch).logits.square().mean().backward()
    optimizer.step()
    for name, part in (("0.fc1", "image"), ("1.self_attn.q_proj", "text")):
        first = loaded.get_parameter(plan.parts["image"].names[f"{name}.weight"])
        second = loaded.get_parameter(plan.parts["text"].names[f"{name}.weight"])
        assert first is second
        assert not torch.equal(
            first, trunk.model.get_parameter(plan.parts[part].names[f"{name}.weight"])
        )
    loaded.save_pretrained(tmp_path / "trained")
    again = alloy.load_shared(tmp_path / "trained")
    assert largest_change(answers(again, batch), answers(loaded, batch)) == 0
    copied = copy.deepcopy(again)
    assert sum(p.numel() for p in copied.parameters()) == plan.num_parameters[1]
