"""Laws of the objectives on images and captions."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from alloy.modality.masking import IGNORED, Masking, mask_whole_words, masking_of
from alloy.modality.pretraining import (
    caption_losses,
    image_losses,
    patches_of,
    text_losses,
    wrong_partners,
)
from alloy.processes import Processes

MASKING = Masking(
    mask_token_id=3,
    continues_V=torch.arange(30) >= 20,
    special_V=torch.arange(30) < 4,
    share=0.3,
)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def words_of(row: list[int]) -> list[list[int]]:
    """Places of the tokens of each word."""
    words: list[list[int]] = []
    for place, token in enumerate(row):
        if token < 4:
            continue
        if token >= 20 and words and words[-1][-1] == place - 1:
            words[-1].append(place)
        else:
            words.append([place])
    return words


def test_words_are_hidden_whole_and_as_often_as_asked():
    """All tokens of a word are chosen or none; 80 % are masked, 10 % random, 10 % stay."""
    ids = torch.randint(4, 30, (300, 21), generator=seeded())
    ids[:, 0], ids[:, 15:] = 1, 0
    mask = (ids != 0).long()
    hidden, labels = mask_whole_words(ids, mask, MASKING, seeded(1))
    chosen = labels != IGNORED
    for row in range(len(ids)):
        for word in words_of(ids[row].tolist()):
            assert chosen[row, word].all() or not chosen[row, word].any()
    assert chosen.sum(1).min() >= 1
    assert chosen[:, 1:15].float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert not chosen[:, 0].any()
    assert not chosen[:, 15:].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    masked = (hidden == 3)[chosen].float().mean().item()
    stays = (hidden == ids)[chosen].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.04)
    assert stays == pytest.approx(0.1, abs=0.04)


class Tokenizer:
    """The part of a tokenizer that masking reads."""

    name_or_path = "models/toy"
    special_tokens_map = {"cls_token": "[CLS]"}  # noqa: RUF012

    def __init__(self, tokens, mask):
        self.tokens, self.mask_token_id, self.all_special_ids = tokens, mask, [0]

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]


@pytest.mark.parametrize(
    "tokens", [["[CLS]", "play", "##ing"], ["[CLS]", "▁play", "ing"], ["[CLS]", "Ġplay", "ing"]]
)
def test_tokenizers_say_which_tokens_go_on(tokens):
    """WordPiece, SentencePiece and byte-level pairs mark words in ways of their own."""
    masking = masking_of(Tokenizer(tokens, 0), 0.15)
    assert masking.continues_V.tolist() == [False, False, True]
    assert masking.special_V.tolist() == [True, False, False]


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="models/toy: the tokenizer has no mask token"):
        masking_of(Tokenizer(["[CLS]"], None), 0.15)


def test_wrong_partners_are_wrong_and_the_likelier_the_closer():
    """Nobody is matched with its own partner; at a high scale the nearest other is drawn."""
    image = F.normalize(torch.randn(6, 5, generator=seeded()), dim=-1)
    scale = torch.tensor(200.0).log()
    to_text, to_image = wrong_partners(image, image, scale, seeded(2))
    similar = (image @ image.T).fill_diagonal_(-9)
    assert (to_text != torch.arange(6)).all()
    assert (to_image != torch.arange(6)).all()
    assert torch.equal(to_text, similar.argmax(1))


def test_a_batch_of_one_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="batch_size must be 2 or more"):
        wrong_partners(one, one, torch.tensor(1.0), seeded())


@pytest.mark.parametrize("joint_contrast", [False, True])
def test_the_losses_of_captions_start_near_chance_and_train_all_heads(
    model, inputs, joint_contrast
):
    """A fresh model knows nothing: log B, log 2, log V; every trained head gets a gradient."""
    made = model(joint_contrast=joint_contrast, initializer_range=0.02)
    losses = caption_losses(made, inputs, MASKING, seeded())
    assert losses["contrastive"].item() == pytest.approx(torch.tensor(4.0).log().item(), abs=1.5)
    assert losses["matching"].item() == pytest.approx(torch.tensor(2.0).log().item(), abs=0.1)
    assert losses["masked_words"].item() == pytest.approx(torch.tensor(30.0).log().item(), abs=0.3)
    torch.stack(list(losses.values())).sum().backward()
    heads = ["image_projection", "text_projection", "statement_head", "masked_word_head.decoder"]
    heads += ["joint_image_projection", "joint_text_projection"] if joint_contrast else []
    for head in heads:
        assert made.get_submodule(head).weight.grad.abs().sum() > 0, head


@dataclass(frozen=True)
class Threads(Processes):
    """Two threads of this process that work together."""

    shared: list = field(default_factory=lambda: [None, None])
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))

    def gather(self, x):
        self.shared[self.rank] = x.detach()
        self.barrier.wait()
        rows = torch.cat(list(self.shared))
        self.barrier.wait()
        return rows

    def add_up(self, tensors):
        for tensor in tensors:
            tensor.copy_(self.gather(tensor[None]).sum(0))


@pytest.mark.parametrize("kind", ["captions", "texts", "images"])
def test_two_processes_have_the_losses_of_one(model, inputs, kind):
    """The sum over processes is the loss of the whole batch: negatives come from all of it."""
    made = model(joint_contrast=True, masked_patches=True)

    def losses(batch, processes):
        if kind == "captions":
            return caption_losses(made, batch, MASKING, seeded(), processes)
        if kind == "texts":
            return text_losses(made, batch, MASKING, seeded(), processes)
        return image_losses(made, batch, 0.5, seeded(), processes)

    one, parts = Threads(0, 2), {}
    both = [one, Threads(1, 2, one.shared, one.barrier)]

    def work(processes):
        parts[processes.rank] = losses(processes.share(inputs), processes)

    threads = [threading.Thread(target=work, args=(p,)) for p in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, whole in losses(inputs, Processes()).items():
        total = parts[0][name] + parts[1][name]
        torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)


def test_hidden_patches_are_not_seen_and_their_pixels_are_asked_for(model, inputs):
    """States do not depend on the pixels behind the mask; patches are in the tokens' order."""
    made = model(masked_patches=True)
    hidden = torch.zeros(4, 9, dtype=torch.bool)
    hidden[:, 4] = True
    pixels = inputs["pixel_values"]
    other = pixels.clone()
    other[:, :, 4:8, 4:8] = 255 - other[:, :, 4:8, 4:8]
    states = [made.image_states(x, hidden_BP=hidden) for x in (pixels, other)]
    assert torch.equal(*states)
    assert not torch.equal(made.image_states(pixels), made.image_states(other))
    patch = patches_of(pixels.float(), 4)[:, 4].view(4, 3, 4, 4)
    assert torch.equal(patch, pixels[:, :, 4:8, 4:8].float())


def test_drop_path_leaves_out_updates_in_training_alone(model, inputs):
    """Evaluation is what it is without; in training examples differ, and the mean is kept."""
    plain, dropping = model(), model(drop_path=0.5)
    args = inputs["pixel_values"]
    assert torch.equal(plain.encode_image(args), dropping.encode_image(args))
    last = dropping.blocks[-1].drop_path.train()
    assert [block.drop_path.probability for block in dropping.blocks] == [0, 0.25, 0.5]
    kept = last(torch.ones(4000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert (kept.flatten(1).std(1) == 0).all()
    assert kept.mean().item() == pytest.approx(1, abs=0.1)


def test_a_second_image_has_a_type_of_its_own(model, inputs):
    """With two types of images the second is told from the first; with one there is none."""
    made = model(num_image_types=2)
    args = [inputs[n] for n in ("pixel_values", "input_ids", "attention_mask")]
    first, second = (made.encode_joint(*args, image_type=i) for i in range(2))
    assert not torch.allclose(first, second)
    made.type_embeddings.weight.data[2] = made.type_embeddings.weight[1]
    assert torch.equal(made.encode_joint(*args, image_type=1), first)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"drop_path": 1.0}, "must lie between 0 and 1"), ({"num_image_types": 3}, "must be 1 or 2")],
)
def test_impossible_settings_are_refused(config, setting, message):
    with pytest.raises(ValueError, match=message):
        config(**setting)
