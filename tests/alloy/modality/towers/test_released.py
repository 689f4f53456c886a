"""Files of vl-merging and VLMo compute what their papers say, and run none of their code."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from alloy.errors import CheckpointError
from alloy.modality import import_release
from tests.alloy.modality.towers.reference import Reference, state_dict

CASES = {
    "vl-merging": ("vl-merging", 1, True),
    "vl-merging, all blocks joint": ("vl-merging", 3, True),
    "agnostic": ("agnostic", 2, True),
    "vlmo": ("vlmo", 1, True),
    "vlmo with absolute positions": ("vlmo", 2, False),
}


@pytest.fixture
def released(tmp_path):
    """A function that writes a file of a case and imports it, with what it was made of."""

    def make(case: str, **changes):
        kind, joint, relative = CASES[case]
        weights = state_dict(kind, joint, relative) | changes
        path = tmp_path / "model.ckpt"
        settings = {"vlffn_start_layer_index": 3 - joint, "num_heads": 3}
        torch.save({"state_dict": weights, "hyper_parameters": {"config": settings}}, path)
        return import_release(path), Reference(kind, weights, joint)

    return make


@pytest.fixture
def pairs(images, texts):
    return images, *texts.values()


def assert_same(ours, theirs):
    assert theirs.std() > 0.03
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_released_models_compute_what_their_papers_say(case, released, pairs):
    """Both passes and every head, in float64."""
    release, reference = released(case)
    model, (images, ids, mask) = release.model(), pairs
    words = mask.bool()
    image, text = reference.image_states(images), reference.text_states(ids, mask)
    assert_same(model.final_norm(model.image_states(images), "v"), image)
    assert_same(model.final_norm(model.text_states(ids, mask), "l")[words], text[words])
    joint = reference.joint_states(images, ids, mask)
    output = model(images, ids, mask)
    seen = torch.cat([words, torch.ones(3, 10, dtype=torch.bool)], 1)
    assert_same(output.joint_states[seen], joint[seen])
    assert_same(output.masked_word_logits[words], reference.masked_words(joint[:, :7])[words])
    assert_same(output.answer_logits, reference.answers(joint))
    assert_same(output.statement_logits, reference.linear(reference.pool(joint), "itm_score.fc"))
    contrast = "itc" if reference.kind == "vlmo" else "ifm"
    projected = reference.linear(image[:, 0], f"{contrast}_image_proj.fc")
    assert_same(output.image_embeddings, F.normalize(projected, dim=-1))


@pytest.mark.parametrize("case", CASES)
def test_export_undoes_import(case, released):
    release, reference = released(case)
    exported = release.export()
    assert exported.keys() == reference.weights.keys()
    assert all(torch.equal(exported[name], t) for name, t in reference.weights.items())


def test_the_config_is_read_off_the_weights(released):
    config = released("vl-merging")[0].config
    assert (config.sharing, config.num_joint_layers, config.num_attention_heads) == ("none", 1, 3)
    assert (config.image_size, config.relative_text_distance) == (12, 9)
    assert released("vlmo")[0].config.sharing == "custom_ffn"
    assert released("agnostic")[0].config.sharing == "all"


def test_a_file_without_a_head_leaves_it_fresh(tmp_path):
    weights = state_dict("vl-merging")
    lean = {n: t for n, t in weights.items() if not n.startswith(("mlm_score", "vqa", "itm"))}
    torch.save(lean, tmp_path / "lean.ckpt")
    release = import_release(tmp_path / "lean.ckpt")
    assert release.config.num_answers == 0
    assert release.export().keys() == lean.keys()
    assert "masked_word_head.decoder.weight" not in release.weights
    release.model()


def test_states_of_one_modality_do_not_lead_to_vlmos_joint_blocks(released, pairs):
    model = released("vlmo")[0].model()
    lower = model.image_states(pairs[0], 2), model.text_states(pairs[1], pairs[2], 2)
    with pytest.raises(ValueError, match="lower blocks of this model see both modalities"):
        model.join_states(*lower, pairs[2])


def test_lower_blocks_see_both_only_with_one_attention(released):
    config = released("vl-merging")[0].config.to_dict()
    with pytest.raises(ValueError, match="share a pre-norm attention, not with sharing 'none'"):
        type(released("vlmo")[0].config)(**config | {"lower_blocks_see": "both"})


@torch.no_grad()
@pytest.mark.parametrize("separate", [True, False])
def test_vl_mergings_settings_say_what_its_lower_blocks_see(separate, tmp_path, pairs):
    """Without separate inference an agnostic model's joint pass is VLMo's with one network."""
    weights = state_dict("agnostic")
    settings = {"vlffn_start_layer_index": 2, "separate_inference": separate}
    content = {"state_dict": weights, "hyper_parameters": {"config": settings}}
    torch.save(content, tmp_path / "model.ckpt")
    release = import_release(tmp_path / "model.ckpt")
    assert release.config.lower_blocks_see == ("one" if separate else "both")
    reference = Reference("agnostic", weights, 1, together=not separate)
    seen = torch.cat([pairs[2].bool(), torch.ones(3, 10, dtype=torch.bool)], 1)
    assert_same(release.model().encode_joint(*pairs)[seen], reference.joint_states(*pairs)[seen])


def test_experts_of_attention_that_see_both_are_refused(tmp_path):
    settings = {"config": {"self_attn_for_single_mode": False}}
    content = {"state_dict": state_dict("vl-merging"), "hyper_parameters": settings}
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="records self_attn_for_single_mode=False"):
        import_release(tmp_path / "model.ckpt")


# What stands in a pickle.


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save({"state_dict": state_dict("vlmo"), "callbacks": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(CheckpointError, match=r"names \['builtins\.print'\] \(1 in all\)"):
        import_release(tmp_path / "bomb.ckpt")
    assert "executed" not in capsys.readouterr().out


def test_a_trainers_own_objects_are_read_as_empty_records(tmp_path, monkeypatch):
    """What Lightning saves beside the weights does not stand in the way, and is not imported."""
    module = types.ModuleType("vilt.moe.config")
    module.MOEConfig = type("MOEConfig", (), {"__module__": "vilt.moe.config"})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": "vilt.moe.config"})
    for name, part in (("vilt", None), ("vilt.moe", None), ("vilt.moe.config", module)):
        monkeypatch.setitem(sys.modules, name, part or types.ModuleType(name))
    weights = state_dict("agnostic")
    config = module.MOEConfig()
    config.in_attn = True
    settings = module.AttributeDict(config={"vlffn_start_layer_index": 2}, moe_config=config)
    torch.save(
        {"state_dict": weights, "hyper_parameters": settings, "callbacks": {module.MOEConfig: 1}},
        tmp_path / "last.ckpt",
    )
    monkeypatch.undo()
    assert import_release(tmp_path / "last.ckpt").config.num_joint_layers == 1
    assert "vilt.moe.config" not in sys.modules


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of torch.save.*No such file"):
        import_release(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "no checkpoint of torch.save"),
        ([1, 2], "holds a list, not a dict of weights"),
        ({"model": "vit"}, r"\['model'\] are no tensors"),
        ({"state_dict": {"epoch": 3}}, r"\['epoch'\] are no tensors"),
        (
            {"encoder.weight": torch.ones(1)},
            r"no weights of vl-merging or VLMo .*'encoder\.weight'",
        ),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        import_release(path)


@pytest.mark.parametrize(
    ("kind", "taken", "added", "message"),
    [
        ("vlmo", [], {"transformer.gate": 1}, r"no layer .* takes: \['transformer\.gate'\]"),
        ("vlmo", ["transformer.norm.weight"], {}, r"missing: \['transformer\.norm\.weight'\]"),
        (
            "vlmo",
            ["token_type_embeddings.weight"],
            {},
            r"missing: \['token_type_embeddings\.weight'\] \(sizes",
        ),
        ("vlmo", [], {"token_type_embeddings.weight": (4, 12)}, "has 4 rows: texts, images and a"),
        ("vl-merging", [], {"transformer.norm.weight": (5,)}, r"\[5\]: the config asks for \[12\]"),
        ("agnostic", [], {}, "say num_joint_layers"),
        ("vlmo absolute", [], {}, "say num_attention_heads"),
    ],
)
def test_what_a_file_does_not_tell_or_fit_is_named(kind, taken, added, message, tmp_path):
    weights = state_dict(kind.split()[0], relative="absolute" not in kind)
    weights |= {name: torch.ones(shape).double() for name, shape in added.items()}
    for name in taken:
        del weights[name]
    torch.save(weights, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=message):
        import_release(tmp_path / "model.ckpt")


def test_a_sharing_that_no_config_has_is_named(tmp_path):
    weights = state_dict("vl-merging")
    shared = {n.replace(".norm2.v.", ".norm2."): t for n, t in weights.items()}
    torch.save(
        {n: t for n, t in shared.items() if ".norm2.l" not in n and ".norm2.vl" not in n},
        tmp_path / "model.ckpt",
    )
    with pytest.raises(CheckpointError, match=r"experts of \['attention', 'ffn', 'norm1'\]"):
        import_release(tmp_path / "model.ckpt")
