"""Make one trunk of the two towers of a model.

    python examples/towers.py

A small SigLIP learns digits and their names from scratch, one tower for images and one for texts.
Both towers then share one trunk, merged without any training, and go back into the model. It takes
a minute and writes examples/out/towers.png.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from transformers import SiglipConfig, SiglipModel

from alloy.modality import ModalityModel, import_tower, join_towers
from alloy.modality.sensitivity import sensitivities_of
from alloy.modality.sequential import average_of_experts, merge_sequentially
from tasks.data.classification import Split, read_mnist

OUT = Path(__file__).parent / "out"
NAMES = torch.stack([torch.arange(10) + 3, torch.full((10,), 2)], dim=1)  # a digit's word, the end


def model() -> SiglipModel:
    """A SigLIP with towers of equal shape."""
    torch.manual_seed(0)
    layers = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    images = {"image_size": 28, "patch_size": 7, "num_channels": 1}
    texts = {"vocab_size": 13, "max_position_embeddings": 2, "projection_size": 48}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return SiglipModel(
        SiglipConfig(vision_config=layers | images, text_config=layers | texts | tokens)
    )


def train(model: SiglipModel, digits: Split, num_steps: int) -> None:
    """Bring each image close to its digit's name, away from the others' (contrast over names)."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        rows = torch.randint(0, len(digits.labels), (128,), generator=generator)
        logits = model(input_ids=NAMES, pixel_values=digits.examples[rows]).logits_per_image
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, digits.labels[rows]).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: SiglipModel, digits: Split) -> float:
    """Share of images whose closest name is the right one."""
    logits = model(input_ids=NAMES, pixel_values=digits.examples).logits_per_image
    return (logits.argmax(1) == digits.labels).float().mean().item()


def batches(digits: Split) -> Iterator[Mapping[str, torch.Tensor]]:
    """Calibration data without labels: images, and names that have nothing to do with them."""
    for start in range(0, 512, 128):
        names = NAMES[torch.arange(128) % 10]
        yield {
            "pixel_values": digits.examples[start : start + 128],
            "input_ids": names,
            "attention_mask": torch.ones_like(names),
        }


def main(num_steps: int = 500, out: Path = OUT) -> Mapping[str, float]:
    """Train, merge the trunks and measure; return accuracies by merge."""
    digits = read_mnist()
    siglip = model()
    train(siglip, digits["train"], num_steps)
    test = digits["test"].take(torch.arange(2000))
    scores = {"two towers": accuracy(siglip, test)}

    image, text = (import_tower(siglip, part) for part in ("vision_model", "text_model"))
    experts = join_towers(image, text)
    calibration = list(batches(digits["validation"]))
    merges: Mapping[str, ModalityModel] = {
        "average": average_of_experts(experts),
        "least squares": merge_sequentially(
            experts, calibration, sensitivities_of(experts, calibration)
        ),
    }
    for name, merged in merges.items():
        weights = merged.state_dict()
        back = (
            image.with_weights(weights, "v").export() | text.with_weights(weights, "l").export_own()
        )
        siglip.load_state_dict(back)
        scores[f"one trunk, {name}"] = accuracy(siglip, test)

    for name, score in scores.items():
        print(f"{name:26} {score:6.1%} of the digits are closest to their name")
    plot(scores, out / "towers.png")
    return scores


def plot(scores: Mapping[str, float], file: Path) -> None:
    """Draw one bar a model."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(6, 2), layout="constrained")
    axis.barh(list(scores), list(scores.values()), color=["#8c9bab", "#f0c49f", "#e07b39"])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="share of digits that are closest to their name")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    print(f"The plot: {file}")


if __name__ == "__main__":
    main()
