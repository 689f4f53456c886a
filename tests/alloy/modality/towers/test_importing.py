"""An imported tower computes what it computed, and goes back as it came."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers

from alloy.errors import CheckpointError
from alloy.modality import ModalityModel, Tower, import_tower

RELATIVE = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True}
CLASS_TOKEN = {"use_mean_pooling": False}
IMAGE_TOWERS = {
    "beit": ("BeitModel", "BeitConfig", None, {**RELATIVE, **CLASS_TOKEN}),
    "beit with one table": ("BeitModel", "BeitConfig", None, {**SHARED, **CLASS_TOKEN}),
    "beit with positions": (
        "BeitModel",
        "BeitConfig",
        None,
        {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0, **CLASS_TOKEN},
    ),
    "beit in a classifier": (
        "BeitForImageClassification",
        "BeitConfig",
        None,
        {**RELATIVE, **CLASS_TOKEN, "use_mask_token": True},
    ),
    "beit before pre-training's head": (
        "BeitForMaskedImageModeling",
        "BeitConfig",
        None,
        {**SHARED, **CLASS_TOKEN, "use_mask_token": True},
    ),
    "vit": ("ViTModel", "ViTConfig", None, {}),
    "vit without biases": ("ViTModel", "ViTConfig", None, {"qkv_bias": False}),
    "vit in a classifier": ("ViTForImageClassification", "ViTConfig", None, {}),
    "deit": ("DeiTModel", "DeiTConfig", None, {}),
    "dinov2": ("Dinov2Model", "Dinov2Config", None, {}),
    "clip": ("CLIPModel", "CLIPConfig", "vision_model", {}),
    "clip alone": ("CLIPVisionModel", "CLIPVisionConfig", None, {"hidden_act": "gelu"}),
    "flava": ("FlavaModel", "FlavaConfig", "image_model", {}),
    "flava alone": ("FlavaImageModel", "FlavaImageConfig", None, {}),
    "siglip": ("SiglipModel", "SiglipConfig", "vision_model", {}),
    "siglip alone": ("SiglipVisionModel", "SiglipVisionConfig", None, {}),
}
TEXT_TOWERS = {
    "bert": ("BertModel", "BertConfig", None, {}),
    "bert with its head": ("BertForMaskedLM", "BertConfig", None, {"type_vocab_size": 3}),
    "roberta": ("RobertaModel", "RobertaConfig", None, {}),
    "roberta, other padding": ("RobertaForMaskedLM", "RobertaConfig", None, {"pad_token_id": 2}),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", None, {}),
    "flava": ("FlavaModel", "FlavaConfig", "text_model", {}),
    "flava alone": ("FlavaTextModel", "FlavaTextConfig", None, {}),
    "clip": ("CLIPModel", "CLIPConfig", "text_model", {}),
    "clip alone": ("CLIPTextModel", "CLIPTextConfig", None, {}),
    "siglip": ("SiglipModel", "SiglipConfig", "text_model", {}),
    "siglip alone": ("SiglipTextModel", "SiglipTextConfig", None, {}),
}


STATE_TOWERS = {
    "flava": ("FlavaModel", "FlavaConfig", "multimodal_model", {"use_cls_token": False}),
    "flava alone": ("FlavaMultimodalModel", "FlavaMultimodalConfig", None, {}),
    "whisper": ("WhisperModel", "WhisperConfig", "encoder", {}),
    "whisper with its head": ("WhisperForConditionalGeneration", "WhisperConfig", "encoder", {}),
}
TOWERS = {
    "images": IMAGE_TOWERS,
    "texts": TEXT_TOWERS,
    "states": STATE_TOWERS,
}


def part_of(model, part: str | None):
    """The tower in a transformers model, or what is left of the model without its head."""
    return model.base_model if part is None else model.get_submodule(part)


def image_states(model: ModalityModel, images: torch.Tensor) -> torch.Tensor:
    return model.final_norm(model.image_states(images), "v")


def text_states(model: ModalityModel, texts: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.final_norm(model.text_states(*texts.values()), "l")


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float64
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("case", IMAGE_TOWERS)
def test_image_towers_compute_what_they_computed(case, hf_model, images):
    model, config, part, changes = IMAGE_TOWERS[case]
    model = hf_model(model, config, **changes)
    tower = part_of(model, part)
    theirs = tower(images).last_hidden_state
    if model.config.model_type.startswith("clip"):  # its norm stands behind the pooling
        theirs = tower.post_layernorm(theirs)
    assert_same(image_states(import_tower(model, part).model(), images), theirs)


@torch.no_grad()
@pytest.mark.parametrize("bias", [RELATIVE, SHARED, {}])
def test_beit_pools_its_patches_and_norms_their_mean(bias, hf_model, images):
    """A fine-tuned BEiT has no norm behind its blocks, but one behind the pooling."""
    model = hf_model("BeitModel", "BeitConfig", **bias)
    theirs = model(images)
    tower = import_tower(model)
    ours = tower.model(embedding_size=5)
    states = ours.image_states(images)
    assert_same(states, theirs.last_hidden_state)
    pooled = F.linear(theirs.pooler_output, ours.image_projection.weight)
    assert_same(ours.embed_image(states), F.normalize(pooled, dim=-1))
    assert_exports(tower, model)


@torch.no_grad()
def test_a_beit_without_pooling_has_no_final_norm(hf_model, images):
    model = hf_model("BeitForMaskedImageModeling", "BeitConfig", use_mask_token=True)
    tower = import_tower(model)
    assert tower.config.final_norm == "none"
    assert "layernorm.weight" in tower.kept  # of the head
    assert_same(image_states(tower.model(), images), model.beit(images).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("bias", [RELATIVE, SHARED])
def test_the_papers_start_copies_beit_into_every_expert(bias, hf_model, images):
    """One table of positions for each block, with rows of zeros for texts."""
    tower = import_tower(hf_model("BeitModel", "BeitConfig", **bias))
    start = tower.model(
        sharing="none",
        num_joint_layers=1,
        relative_position_bias="layer",
        relative_text_distance=9,
        text_positions="none",
    )
    table = start.state_dict()["position_bias.table"]
    assert table.shape == (25 + 3 + 2 * 9 + 2, 2 * 3)
    assert not table[28:].any()
    assert_same(start.image_states(images), tower.model().image_states(images))
    ids = torch.randint(1, 30, (3, 5))
    joint = start.encode_joint(images, ids, torch.ones_like(ids))
    assert joint.shape == (3, 15, 12)
    assert joint.isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"relative_position_bias": "shared"},
        {"num_attention_heads": 4},
        {"relative_position_bias": None},
    ],
)
def test_a_table_that_does_not_fit_is_refused(changes, hf_model):
    tower = import_tower(hf_model("BeitModel", "BeitConfig", **RELATIVE))
    with pytest.raises(CheckpointError, match=r"position_bias\.table"):
        tower.model(**changes)


@torch.no_grad()
@pytest.mark.parametrize("case", TEXT_TOWERS)
def test_text_towers_compute_what_they_computed(case, hf_model, texts):
    model, config, part, changes = TEXT_TOWERS[case]
    model = hf_model(model, config, **changes)
    words = texts["attention_mask"].bool()
    theirs = part_of(model, part)(**texts).last_hidden_state
    assert_same(text_states(import_tower(model, part).model(), texts)[words], theirs[words])


@torch.no_grad()
@pytest.mark.parametrize("case", STATE_TOWERS)
def test_towers_of_states_compute_what_they_computed(case, hf_model):
    """From the states that other layers made: FLAVA's pairs, Whisper's sounds."""
    model, config, part, changes = STATE_TOWERS[case]
    model = hf_model(model, config, **changes)
    tower = part_of(model, part) if "whisper" not in case else model.get_encoder()
    if "whisper" in case:
        inputs = torch.randn(3, 4, 12).double()
        states = F.gelu(tower.conv2(F.gelu(tower.conv1(inputs)))).mT + tower.embed_positions.weight
    else:
        inputs = states = torch.randn(3, 9, 12).double()
    if case == "flava alone":
        states = torch.cat([tower.cls_token.expand(3, -1, -1), states], dim=1)
    ours = import_tower(model, part).model()
    assert_same(
        ours.final_norm(ours.run_blocks(states, "v", 0, None), "v"), tower(inputs).last_hidden_state
    )


@torch.no_grad()
def test_a_decoder_without_cross_attention_computes_what_it_computes_alone(hf_model, texts):
    """Whisper's decoder without sounds; with them its cross-attention would be missing."""
    model = hf_model("WhisperModel", "WhisperConfig")
    with pytest.raises(CheckpointError, match=r"has cross-attention, which.*without=\['cross-"):
        import_tower(model, "decoder")
    tower = import_tower(model, "decoder", without=["cross-attention"])
    words = texts["attention_mask"].bool()
    theirs = model.decoder(**texts).last_hidden_state
    assert_same(text_states(tower.model(), texts)[words], theirs[words])
    assert "decoder.layers.0.encoder_attn.k_proj.weight" in tower.kept
    assert_exports(tower, model)


@torch.no_grad()
def test_types_of_words_are_carried(hf_model, texts):
    model = hf_model("BertModel", "BertConfig")
    ids, mask = texts.values()
    types = torch.ones_like(ids)
    types[:, :3] = 0
    theirs = model(**texts, token_type_ids=types).last_hidden_state
    ours = import_tower(model).model().text_states(ids, mask, None, types)
    assert_same(ours[mask.bool()], theirs[mask.bool()])


def assert_exports(tower: Tower, model) -> None:
    exported, weights = tower.export(), model.state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("inputs", "case"), [(inputs, case) for inputs, cases in TOWERS.items() for case in cases]
)
def test_export_undoes_import(inputs, case, hf_model):
    """Every tensor of the model comes back, equal to the bit, heads and other towers included."""
    model, config, part, changes = TOWERS[inputs][case]
    model = hf_model(model, config, **changes)
    tower = import_tower(model, part)
    assert tower.inputs == inputs
    assert_exports(tower, model)


def test_a_changed_tower_exports_its_changes(hf_model, images):
    """What training does to the blocks, the other model computes too."""
    model = hf_model("SiglipModel", "SiglipConfig")
    tower = import_tower(model, "vision_model")
    trained = tower.model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1
        trained.type_embeddings.weight.zero_()
    model.load_state_dict(tower.with_weights(trained.state_dict()).export())
    with torch.no_grad():
        theirs = model.vision_model(images).last_hidden_state
        assert_same(image_states(trained, images), theirs)


@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_a_folder_is_imported_as_its_model(shard, hf_model, images, tmp_path):
    model = hf_model("ViTForImageClassification", "ViTConfig")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    tower = import_tower(tmp_path)
    assert tower.export().keys() == model.state_dict().keys()
    assert_same(image_states(tower.model(), images), model.vit(images).last_hidden_state)


@torch.no_grad()
def test_one_tower_starts_all_experts(hf_model, images):
    """Every modality's experts are copies of the tower; the image tower stays what it was."""
    tower = import_tower(hf_model("Dinov2Model", "Dinov2Config"))
    whole = tower.model(sharing="none", num_joint_layers=1, vocab_size=11)
    weights = whole.state_dict()
    for name in (n for n in weights if ".v." in n):
        assert torch.equal(weights[name], weights[name.replace(".v.", ".l.")])
    assert torch.equal(weights["blocks.1.ffn.v.fc1.weight"], weights["blocks.1.ffn.vl.fc1.weight"])
    assert "blocks.0.ffn.vl.fc1.weight" not in weights
    assert weights["text_embeddings.words.weight"].shape == (11, 12)
    assert torch.equal(image_states(whole, images), image_states(tower.model(), images))


@torch.no_grad()
@pytest.mark.parametrize("image_size", [8, 20])
def test_a_tower_of_another_image_size_interpolates_as_transformers_does(image_size, hf_model):
    model = hf_model("ViTModel", "ViTConfig")
    images = torch.randn(2, 3, image_size, image_size).double()
    ours = import_tower(model).model(image_size=image_size)
    theirs = model(images, interpolate_pos_encoding=True).last_hidden_state
    assert_same(image_states(ours, images), theirs)


def test_what_is_fresh_depends_on_the_seed_alone(hf_model):
    tower = import_tower(hf_model("ViTModel", "ViTConfig"))
    first, second, other = (tower.model(seed=seed).state_dict() for seed in (0, 0, 1))
    name = "text_embeddings.words.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


# Refusals.


def other_model(config: str, **sizes):
    return transformers.AutoModel.from_config(getattr(transformers, config)(**sizes))


SMALL = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 30}


@pytest.mark.parametrize(
    ("config", "sizes", "reason"),
    [
        ("LlamaConfig", {**SMALL, "intermediate_size": 8}, "its positions are rotary"),
        (
            "SwinConfig",
            {"image_size": 8, "patch_size": 4, "embed_dim": 4, "depths": [1], "num_heads": [1]},
            "it attends within windows",
        ),
        ("ElectraConfig", {**SMALL, "embedding_size": 12, "intermediate_size": 8}, "choose one of"),
    ],
)
def test_architectures_without_an_importer_are_refused(config, sizes, reason):
    with pytest.raises(CheckpointError, match=f"has no tower for the modality.*{reason}"):
        import_tower(other_model(config, **sizes))


@pytest.mark.parametrize(
    ("model", "config", "changes", "message"),
    [
        ("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}, "gated .SwiGLU."),
        ("BertModel", "BertConfig", {"is_decoder": True}, "it is a decoder"),
        ("ViTModel", "ViTConfig", {"hidden_act": "silu"}, "activation 'silu' is none of"),
        ("ViTModel", "ViTConfig", {"image_size": (12, 8)}, r"image_size \(12, 8\) is not square"),
    ],
)
def test_settings_that_cannot_be_carried_are_refused(model, config, changes, message, hf_model):
    with pytest.raises(CheckpointError, match=message):
        import_tower(hf_model(model, config, **changes))


def test_heads_of_another_width_are_refused(hf_model):
    model = hf_model("ViTModel", "ViTConfig")
    model.config.head_dim = 8
    with pytest.raises(CheckpointError, match=r"heads are 8 wide, .* 12 / 3"):
        import_tower(model)


@pytest.mark.parametrize("part", [None, "vision", "text_mode"])
def test_a_part_must_exist(part, hf_model):
    with pytest.raises(CheckpointError, match=f"clip has no tower {part!r}: .*'vision_model'"):
        import_tower(hf_model("CLIPModel", "CLIPConfig"), part)


def test_what_may_be_left_out_must_exist(hf_model):
    model = hf_model("WhisperModel", "WhisperConfig")
    with pytest.raises(CheckpointError, match="has no 'crossattention' that may be left out"):
        import_tower(model, "decoder", without=["crossattention"])


def test_a_folder_must_be_a_checkpoint(hf_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        import_tower(tmp_path)
    hf_model("ViTModel", "ViTConfig").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        import_tower(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}, "custom code|new"),
        ({"num_hidden_layers": 3}, r"lacks weights \['layers\.2"),
        ({"hidden_size": 9}, "size"),
    ],
)
def test_a_config_that_does_not_fit_its_file_is_refused(settings, message, hf_model, tmp_path):
    """No code of a checkpoint's own is run, and none is asked for."""
    hf_model("ViTModel", "ViTConfig").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(CheckpointError, match=message):
        import_tower(tmp_path)


def test_a_file_that_was_cut_short_is_refused(hf_model, tmp_path):
    hf_model("ViTModel", "ViTConfig").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        import_tower(tmp_path)


def test_a_class_that_is_no_model_is_not_called(hf_model, tmp_path):
    hf_model("ViTModel", "ViTConfig").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["pipeline"]}))
    assert import_tower(tmp_path).name == "vit"


def test_weights_that_a_file_lacks_are_named(hf_model, tmp_path):
    model = hf_model("BertModel", "BertConfig")
    weights = model.state_dict()
    for name in ("pooler.dense.weight", "encoder.layer.1.output.dense.bias"):
        del weights[name]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(CheckpointError, match=r"lacks weights \['encoder.layer.1.*bias'\] \(1 in"):
        import_tower(tmp_path)


def test_what_a_file_lacks_outside_the_tower_is_not_made_up(hf_model, tmp_path):
    model = hf_model("BertModel", "BertConfig")
    weights = model.state_dict()
    del weights["pooler.dense.weight"]
    names = set(weights)
    model.save_pretrained(tmp_path, state_dict=weights)
    assert import_tower(tmp_path).export().keys() == names


@pytest.mark.parametrize(
    ("model", "config", "name"),
    [
        ("BertModel", "BertConfig", "embeddings.position_ids"),
        ("CLIPVisionModel", "CLIPVisionConfig", "embeddings.position_ids"),
        ("BeitModel", "BeitConfig", "layers.0.relative_position_bias.relative_position_index"),
    ],
)
def test_indices_of_older_files_come_back(model, config, name, hf_model, tmp_path):
    """They were saved once; today models compute them and leave them out of their files."""
    model = hf_model(model, config)
    weights = {**model.state_dict(), name: torch.arange(10)[None]}
    model.save_pretrained(tmp_path, state_dict=weights)
    exported = import_tower(tmp_path).export()
    assert exported.keys() >= model.state_dict().keys()
    (surplus,) = exported.keys() - model.state_dict().keys()  # under its name in the file
    assert surplus.endswith(name.rpartition(".")[2])
    assert torch.equal(exported[surplus], torch.arange(10)[None])


def test_surplus_weights_of_a_file_are_kept_or_named(hf_model, tmp_path):
    """Heads of another class stay outside; a layer within the tower is never forgotten."""
    model = hf_model("BertForMaskedLM", "BertConfig")
    weights = model.state_dict()
    head = {"cls.seq_relationship.bias": torch.ones(2), "bert.pooler.dense.bias": torch.ones(12)}
    model.save_pretrained(tmp_path, state_dict=weights | head)
    kept = import_tower(tmp_path).kept
    assert all(torch.equal(kept[name], tensor) for name, tensor in head.items())
    weights["bert.encoder.layer.0.gate"] = torch.ones(2)
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(CheckpointError, match=r"takes: \['bert\.encoder\.layer\.0\.gate'\]"):
        import_tower(tmp_path)


def test_a_layer_that_no_layer_takes_is_named(hf_model):
    model = hf_model("ViTModel", "ViTConfig")
    model.layers[1].mlp.gate = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"takes: \['layers\.1\.mlp\.gate\.bias', "):
        import_tower(model)


def test_a_bias_that_the_other_model_lacks_must_be_zero(hf_model):
    tower = import_tower(hf_model("ViTModel", "ViTConfig", qkv_bias=False))
    weights = dict(tower.weights)
    weights["blocks.0.attention.qkv.bias"] = torch.ones(36).double()
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attention\.qkv\.bias is not zero"):
        tower.with_weights(weights).export()


def test_unknown_settings_are_refused(hf_model):
    tower = import_tower(hf_model("ViTModel", "ViTConfig"))
    with pytest.raises(CheckpointError, match=r"'joint_layers' is no setting.*num_joint_layers"):
        tower.model(joint_layers=1)
