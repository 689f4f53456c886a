"""Write small data sets of our own drawings in the formats of the real ones.

    python -m tasks.data.drawn data/tiny               # 12 examples a split of every set
    python -m tasks.data.drawn data/tiny --start models/tiny/beit    # and a BEiT to start from

Every file lies where the authors' archive would put it and says what theirs would say, so what
reads these reads those. Images are scenes (`tasks.data.scenes`); a set's splits show different
drawings. The same number gives the same bytes.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tasks.data import examples
from tasks.data.examples import words
from tasks.data.scenes.arrangement import Scenes
from tasks.data.scenes.bank import load_bank
from tasks.data.scenes.drawings import CONCEPTS, SPLITS
from tasks.data.scenes.generator import SceneGenerator
from tasks.data.scenes.words import ANSWERS, SEGMENTATION_CLASSES, VOCABULARY
from tasks.recipe.experts import SceneParams
from tasks.storage import write_folder

NUM_EXAMPLES = 12
CAPTIONS_PER_IMAGE = 5
PEOPLE = 10  # answer a question of VQAv2
SCENES = SceneParams(
    seed=0,
    cell_pixels=24,
    label_pixels=6,
    train_cells=16,
    cells=8,
    duplicates=0.25,
    drop=0.3,
    noise=8,
)


class Drawn:
    """Scenes of one set by split, and random numbers of its own."""

    def __init__(self, number: int, num: int) -> None:
        bank = load_bank(SCENES)
        self.num = num
        self.by_split = {split: SceneGenerator(bank, split, seed=0) for split in SPLITS}
        self.rng = np.random.default_rng([7, number])

    def scenes(self, split: str, num: int | None = None) -> tuple[Scenes, np.ndarray]:
        """Scenes and their pixels [N, S, S, 3]."""
        generator = self.by_split[split]
        scenes = generator.scenes(self.num if num is None else num, self.rng)
        pixels, _ = generator.render(scenes, self.rng)
        return scenes, pixels.transpose(0, 2, 3, 1)

    def captions(self, split: str, scenes: Scenes) -> list[list[str]]:
        """Five captions of each scene, the later ones less complete."""
        drawn = [
            self.by_split[split].captions(scenes, self.rng, drop=0.0 if i == 0 else 0.5)
            for i in range(CAPTIONS_PER_IMAGE)
        ]
        return [[words(ids[i].tolist()) for ids in drawn] for i in range(len(scenes))]

    def arrays(self, benchmark: str, split: str, num: int | None = None) -> dict[str, np.ndarray]:
        """Examples of one of the scenes' own benchmarks."""
        num = self.num if num is None else num
        return examples.EXAMPLES[benchmark](self.by_split[split], num, self.rng)


def write_sets(folder: Path, num: int = NUM_EXAMPLES) -> None:
    """Write every set below a folder, `num` examples a split."""
    for number, (name, write) in enumerate(WRITERS.items()):
        with write_folder(folder / name) as root:
            write(root, Drawn(number, num))


def write_coco(root: Path, drawn: Drawn) -> None:
    """Karpathy's split, whose `restval` trains too, and COCO's official files."""
    entries, official = [], {"train2014": ([], []), "val2014": ([], [])}
    parts = [
        ("train", "train", "train2014", drawn.num),
        ("restval", "train", "val2014", max(1, drawn.num // 4)),
        ("val", "validation", "val2014", drawn.num),
        ("test", "test", "val2014", drawn.num),
    ]
    number = 0
    for name, split, folder, num in parts:
        scenes, pixels = drawn.scenes(split, num)
        for image, sentences in zip(pixels, drawn.captions(split, scenes), strict=True):
            number += 1
            file = f"COCO_{folder}_{number:012d}.jpg"
            _save(image, root / folder / file)
            entries.append(
                {
                    "filepath": folder,
                    "filename": file,
                    "cocoid": number,
                    "imgid": number - 1,
                    "split": name,
                    "sentences": _sentences(sentences, number),
                }
            )
            images, annotations = official[folder]
            images.append({"id": number, "file_name": file, "height": 48, "width": 48})
            annotations += [
                {"id": CAPTIONS_PER_IMAGE * number + i, "image_id": number, "caption": sentence}
                for i, sentence in enumerate(sentences)
            ]
    _dump({"images": entries, "dataset": "coco"}, root / "dataset_coco.json")
    for folder, (images, annotations) in official.items():
        path = root / "annotations" / f"captions_{folder}.json"
        _dump({"info": {}, "images": images, "annotations": annotations}, path)


def write_flickr30k(root: Path, drawn: Drawn) -> None:
    entries = []
    for name, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        scenes, pixels = drawn.scenes(split)
        for image, sentences in zip(pixels, drawn.captions(split, scenes), strict=True):
            number = len(entries)
            file = f"{1000 + number}.jpg"
            _save(image, root / "flickr30k-images" / file)
            entries.append(
                {
                    "filename": file,
                    "imgid": number,
                    "split": name,
                    "sentences": _sentences(sentences, number),
                }
            )
    _dump({"images": entries, "dataset": "flickr30k"}, root / "dataset_flickr30k.json")


def _sentences(sentences: Sequence[str], number: int) -> list[dict[str, Any]]:
    return [
        {
            "raw": sentence,
            "tokens": sentence.split(),
            "imgid": number,
            "sentid": CAPTIONS_PER_IMAGE * number + i,
        }
        for i, sentence in enumerate(sentences)
    ]


def write_vqav2(root: Path, drawn: Drawn) -> None:
    """Ten people answer each question, of whom two or three are wrong; test2015 has no answers."""
    image = 0
    for folder, split in (("train2014", "train"), ("val2014", "validation"), ("test2015", "test")):
        data, questions, annotations = drawn.arrays("vqa", split, 3 * drawn.num), [], []
        asks_where = np.flatnonzero(data["kinds"] == 2)[: drawn.num]  # four answers, all common
        data = {name: array[asks_where] for name, array in data.items()}
        for i in range(drawn.num):
            image += 1
            number = 1000 * image
            _save(
                data["pixel_values"][i].transpose(1, 2, 0),
                root / folder / f"COCO_{folder}_{image:012d}.jpg",
            )
            text = words(data["input_ids"][i].tolist()) + "?"
            questions.append({"image_id": image, "question": text, "question_id": number})
            right = ANSWERS[data["labels"][i]]
            given = [right] * (PEOPLE - 3) + ["the " + right, *_others(drawn, right, 2)]
            annotations.append(
                {
                    "image_id": image,
                    "question_id": number,
                    "multiple_choice_answer": right,
                    "question_type": text.split()[0],
                    "answer_type": "other",
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1}
                        for k, answer in enumerate(given)
                    ],
                }
            )
        stem = {"task_type": "Open-Ended", "data_subtype": folder}
        _dump(
            {**stem, "questions": questions}, root / f"v2_OpenEnded_mscoco_{folder}_questions.json"
        )
        if split != "test":
            path = root / f"v2_mscoco_{folder}_annotations.json"
            _dump({**stem, "annotations": annotations}, path)


def _others(drawn: Drawn, right: str, num: int) -> list[str]:
    return [str(a) for a in drawn.rng.choice([a for a in ANSWERS if a != right], num)]


def write_nlvr2(root: Path, drawn: Drawn) -> None:
    parts = (("train", "train"), ("dev", "validation"), ("test1", "test"))
    for name, split in parts:
        data, lines = drawn.arrays("pair_reasoning", split), []
        for i in range(drawn.num):
            pair = f"{name}-{i}-0"
            entry = {
                "identifier": f"{pair}-0",
                "sentence": words(data["input_ids"][i].tolist()).capitalize() + ".",
                "label": str(bool(data["labels"][i])),
            }
            folder = root / name
            if name == "train":
                entry["directory"] = i % 2
                folder = root / "images" / name / str(i % 2)
            for k in range(2):
                pixels = data["pixel_values"][i, k].transpose(1, 2, 0)
                _save(pixels, folder / f"{pair}-img{k}.png")
            lines.append(json.dumps(entry))
        path = root / "nlvr" / "nlvr2" / "data" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def write_ade20k(root: Path, drawn: Drawn) -> None:
    """Maps of the size of their images; background is what no class is, 0."""
    root = root / "ADEChallengeData2016"
    for part, split in (("training", "train"), ("validation", "test")):
        data = drawn.arrays("segmentation", split)
        for i in range(drawn.num):
            stem = f"ADE_{'train' if split == 'train' else 'val'}_{i + 1:08d}"
            image = data["pixel_values"][i].transpose(1, 2, 0)
            block = len(image) // len(data["labels"][i])
            labels = data["labels"][i].repeat(block, axis=0).repeat(block, axis=1)
            _save(image, root / "images" / part / f"{stem}.jpg")
            _save(labels, root / "annotations" / part / f"{stem}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{n}\t0.1\t1\t1\t0\t{name}" for n, name in enumerate(SEGMENTATION_CLASSES) if n]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")


def write_visual_genome(root: Path, drawn: Drawn) -> None:
    scenes, pixels = drawn.scenes("train")
    entries = []
    for i, image in enumerate(pixels):
        _save(image, root / ("VG_100K" if i % 2 else "VG_100K_2") / f"{i + 1}.jpg")
        shown = [CONCEPTS[c] for c in scenes.concepts[i] if c >= 0]
        regions = [
            {"region_id": 10 * i + k, "image_id": i + 1, "phrase": f"there is {name}"}
            | {"x": 0, "y": 0, "width": 24, "height": 24}
            for k, name in enumerate(shown)
        ]
        entries.append({"id": i + 1, "regions": regions})
    _dump(entries, root / "region_descriptions.json")


def write_sbu(root: Path, drawn: Drawn) -> None:
    pairs = []
    for name, image, caption in _pairs(drawn):
        _save(image, root / "images_train" / "0000" / name)
        pairs.append([f"0000/{name}", caption])
    _dump(pairs, root / "annot.json")


def write_cc3m(root: Path, drawn: Drawn) -> None:
    lines = ["title\tfilepath"]
    for name, image, caption in _pairs(drawn):
        _save(image, root / "images" / name)
        lines.append(f"{caption}\timages/{name}")
    (root / "Train_GCC-training_output.csv").write_text("\n".join(lines) + "\n")


def _pairs(drawn: Drawn) -> Iterator[tuple[str, np.ndarray, str]]:
    scenes, pixels = drawn.scenes("train")
    captions = drawn.captions("train", scenes)
    for i, (image, sentences) in enumerate(zip(pixels, captions, strict=True)):
        yield f"{i:09d}.jpg", image, sentences[0]


def write_texts(root: Path, drawn: Drawn) -> None:
    scenes, _ = drawn.scenes("train", 4 * drawn.num)
    lines = [sentences[0] for sentences in drawn.captions("train", scenes)]
    (root / "passages.txt").write_text("\n".join(lines) + "\n")


def write_imagenet(root: Path, drawn: Drawn) -> None:
    """Scenes of one object, sorted into folders by concept."""
    for part, split in (("train", "train"), ("val", "test")):
        generator = drawn.by_split[split]
        chosen = np.arange(drawn.num) % 3
        for i, concept in enumerate(chosen):
            row = np.full((1, 4), -1)
            row[0, i % 4] = concept
            pixels, _ = generator.render(generator.dress(row, drawn.rng), drawn.rng)
            name = CONCEPTS[concept]
            path = root / part / f"n{concept:08d}" / f"{name}_{split}_{i}.JPEG"
            _save(pixels[0].transpose(1, 2, 0), path)


WRITERS = {
    "coco": write_coco,
    "vqav2": write_vqav2,
    "flickr30k": write_flickr30k,
    "nlvr2": write_nlvr2,
    "ade20k": write_ade20k,
    "visual_genome": write_visual_genome,
    "sbu": write_sbu,
    "cc3m": write_cc3m,
    "texts": write_texts,
    "imagenet": write_imagenet,
}


def write_start(folder: Path) -> None:
    """Write a small BEiT of random weights, its image processor, and a tokenizer of BERT's kind.

    The words of all texts are its vocabulary, a few of them in two pieces.
    """
    import torch
    from transformers import BeitConfig, BeitModel

    config = BeitConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        use_relative_position_bias=True,
        layer_scale_init_value=0.5,
        initializer_range=0.2,
        use_mean_pooling=False,
    )
    torch.manual_seed(0)
    model = BeitModel(config, add_pooling_layer=False)
    with write_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer().save_pretrained(partial)
        processor = {
            "image_processor_type": "BeitImageProcessor",
            "do_resize": True,
            "size": {"height": 32, "width": 32},
            "resample": 3,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        (partial / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def tokenizer() -> Any:
    """A WordPiece tokenizer of the texts' words; those with a hyphen are several tokens."""
    from transformers import BertTokenizer

    parts = {part for word in VOCABULARY[4:] for part in word.lower().split("-")}
    long = sorted(part for part in parts if len(part) > 6)
    whole = sorted(parts - set(long))
    pieces = sorted({p for part in long for p in (part[:4], "##" + part[4:])})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = list(dict.fromkeys([*special, *whole, *pieces, "-", "?", "."]))
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=95)


def _dump(value: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tasks.data.drawn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="data/tiny is what recipe paper_tiny reads")
    parser.add_argument("--start", type=Path, help="the folder for a small BEiT to start from")
    parser.add_argument("--num", type=int, default=NUM_EXAMPLES, help="examples a split")
    given = parser.parse_args()
    write_sets(given.folder, given.num)
    if given.start is not None:
        write_start(given.start)
    print(f"wrote {given.folder}: {', '.join(WRITERS)}")
