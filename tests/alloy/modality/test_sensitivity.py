"""Laws of the experts' Grams and of the sensitivities that weight them."""

import torch

from alloy.modality.passes import HIDDEN
from alloy.modality.sensitivity import affine_grams, sensitivities_of, without_constant
from alloy.modality.streams import in_gauge


def test_grams_are_of_the_tokens_that_each_expert_sees(specific, inputs):
    """Affine Grams by hand, in any batching; padding does not count."""
    model = in_gauge(specific())
    halves = [{k: v[part] for k, v in inputs.items()} for part in (slice(2), slice(2, None))]
    grams, again = (affine_grams(model, data) for data in ([inputs], halves))
    mask = inputs["attention_mask"].bool()
    counts = {"v": 4 * 10, "l": int(mask.sum()), "vl": int(mask.sum()) + 4 * 10}
    for modality, own in grams.items():
        for name, gram in own.items():
            assert gram.count == counts[modality]
            torch.testing.assert_close(gram.sum_DD, again[modality][name].sum_DD)
            assert gram.sum_DD[-1, -1] == gram.count
    states = model.text_embeddings(inputs["input_ids"]) + model.type_embeddings.weight[0]
    x_ND = model.blocks[0].norm1["l"](states)[mask]
    gram = without_constant(grams)["l"]["blocks.0.attention.qkv.weight"]
    torch.testing.assert_close(gram.sum_DD, x_ND.T @ x_ND)
    assert {len(name.split(".")) for name in grams["vl"]} == {5}
    assert all(name.startswith("blocks.2.") for name in grams["vl"])


def test_tokens_count_as_much_as_the_answers_depend_on_them(specific, inputs):
    """Behind the last attention only class tokens and words count; as states, all but padding."""
    model = in_gauge(specific())
    sensitivities = sensitivities_of(model, [inputs])
    mask = inputs["attention_mask"].bool()
    num_words = mask.shape[1]
    last = "blocks.2.ffn.fc1"
    (image_BI,), (text_BT,), (pair_BS,) = (
        sensitivities[m][last].samples[0] for m in ("v", "l", "vl")
    )
    assert (image_BI[:, 0] > 0).all()
    assert (image_BI[:, 1:] == 0).all()
    assert (text_BT[:, 0] > 0).all()
    assert (text_BT[:, 1:] == 0).all()
    assert torch.equal(pair_BS[:, :num_words] > 0, mask)
    assert (pair_BS[:, num_words:] == 0).all()
    (first_BI,) = sensitivities["v"]["blocks.0.ffn.fc1"].samples[0]
    assert (first_BI > 0).all()
    hidden = mask & (torch.arange(num_words) == 2)
    (pair_BS,) = sensitivities_of(model, [{**inputs, HIDDEN: hidden}])["vl"][last].samples[0]
    assert torch.equal(pair_BS[:, 1:num_words] > 0, hidden[:, 1:])
    (image_BI,) = sensitivities_of(model, [inputs], "states")["v"][last].samples[0]
    assert (image_BI > 0).all()


def test_weighted_grams_are_sums_over_tokens_and_means_over_examples(specific, inputs):
    model = in_gauge(specific())
    sensitivities = sensitivities_of(model, [inputs])
    grams = affine_grams(model, [inputs], sensitivities)
    gram = grams["l"]["blocks.0.attention.qkv.weight"]
    assert gram.count == len(inputs["input_ids"])
    states = model.text_embeddings(inputs["input_ids"]) + model.type_embeddings.weight[0]
    x_BTD = model.blocks[0].norm1["l"](states)
    (weight_BT,) = sensitivities["l"]["blocks.0.attention.qkv"].samples[0]
    weight_BT = weight_BT * inputs["attention_mask"]
    expected = torch.einsum("bt,btd,bte->de", weight_BT, x_BTD, x_BTD)
    torch.testing.assert_close(gram.sum_DD[:-1, :-1], expected)
    torch.testing.assert_close(gram.sum_DD[-1, -1], weight_BT.sum())
