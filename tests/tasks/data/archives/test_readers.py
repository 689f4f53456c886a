"""Laws of the readers: what the authors' files say arrives, and faults are named by file and id."""

import io
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.data.archives.catalogue import FORMATS, kind_of, open_set
from tasks.data.archives.vqa import UNLABELLED
from tasks.data.drawn import write_sets
from tasks.data.sets.description import Look
from tasks.data.sets.images import decoded
from tasks.data.sets.prepare import prepare_set
from tasks.data.sets.rows import FEATURES, IMAGES, DataError, image_key
from tasks.data.sets.stored import Faults, checked, overlaps, read_rows, write_rows
from tasks.recipe.sets import SetParams
from tasks.storage import folder_digest

SETS = [name for name in FORMATS if not name.endswith(("shards", "official", "columns"))]


def opened(raw, name, **options):
    folder = raw / {"coco_official": "coco"}.get(name, name)
    return open_set(name, folder, held_out=2, options=options)


def faults_of(reader, split="train"):
    """The message about a split's faults, or nothing."""
    found, images = Faults(), set()
    rows = checked(
        reader.rows(split),
        kind_of(reader),
        found,
        num_classes=len(reader.classes()),
        images=images,
    )
    try:
        for _ in rows:
            pass
        found.refuse("set")
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [*SETS, "coco_official"])
def test_every_set_reads_whole_rows_and_splits_that_share_no_image(drawn_sets, name):
    """Rows have the columns of their kind, images open, no image is in two splits."""
    reader = opened(drawn_sets, name)
    assert reader.missing() == []
    assert set(reader.present()) == set(reader.parts)
    images = {}
    for split in reader.splits:
        rows = list(reader.rows(split))
        assert rows, split
        assert faults_of(reader, split) is None
        for row in rows:
            assert set(row) == set(FEATURES[kind_of(reader)])
        columns = IMAGES[kind_of(reader)]
        images[split] = {image_key(row[c]) for row in rows for c in columns}
        for column in columns:
            assert decoded(rows[0][column]).size == (48, 48)
    assert list(overlaps(images)) == []


def test_the_same_number_writes_the_same_bytes(tmp_path, drawn_sets):
    """The script's sets are a function of their size."""
    write_sets(tmp_path / "again", num=6)
    assert folder_digest(tmp_path / "again") == folder_digest(drawn_sets)


def test_restval_trains_and_every_caption_arrives(drawn_sets):
    """Karpathy's restval is part of training; an image has its five captions."""
    reader = opened(drawn_sets, "coco")
    entries = json.loads((drawn_sets / "coco/dataset_coco.json").read_text())["images"]
    counts = Counter(entry["split"] for entry in entries)
    rows = {split: list(reader.rows(split)) for split in reader.splits}
    assert len(rows["train"]) == counts["train"] + counts["restval"]
    assert len(rows["validation"]) == counts["val"]
    assert len(rows["test"]) == counts["test"]
    assert rows["test"][0]["captions"] == [s["raw"] for s in entries[-6]["sentences"]]


def test_questions_keep_the_answers_of_ten_people(drawn_sets):
    """Answers are read as given; the test questions for EvalAI have none."""
    reader = opened(drawn_sets, "vqav2")
    for row in reader.rows("train"):
        assert len(row["answers"]) == 10
    assert reader.has_unlabelled()
    assert all(row["answers"] == [] for row in reader.rows(UNLABELLED))
    sizes = {split: len(list(reader.rows(split))) for split in reader.splits}
    assert sizes == {"train": 6 + 6 - 4, "validation": 2, "test": 2}


def test_rows_lie_on_the_disk_as_they_were_read(drawn_sets, tmp_path):
    """What is written as rows stream by is what is read back, memory-mapped."""
    reader = opened(drawn_sets, "nlvr2")
    assert write_rows(tmp_path / "rows.arrow", "pairs", reader.rows("train")) == 6
    table = read_rows(tmp_path / "rows.arrow")
    assert [dict(row) for row in table] == list(reader.rows("train"))
    assert table.cache_files[0]["filename"] == str(tmp_path / "rows.arrow")


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_image_is_named(raw, share):
    """A JPEG that is cut off anywhere is named with its file and the id of its row."""
    cut(raw / "coco/train2014/COCO_train2014_000000000002.jpg", share)
    message = faults_of(opened(raw, "coco"))
    assert "COCO_train2014_000000000002.jpg (of id 1): " in message
    assert "cut off" in message or "no image" in message
    assert "1 faults" in message


def test_an_image_with_bytes_behind_its_end_is_whole(raw):
    """Some photographs of Flickr30k carry more behind the image."""
    path = raw / "flickr30k/flickr30k-images/1000.jpg"
    path.write_bytes(path.read_bytes() + b"\0more")
    assert faults_of(opened(raw, "flickr30k")) is None


def test_a_missing_image_is_named(raw):
    (raw / "nlvr2/dev/dev-1-0-img1.png").unlink()
    message = faults_of(opened(raw, "nlvr2"), "validation")
    assert "dev-1-0-img1.png (of id dev-1-0-0): the image is missing" in message


def test_an_id_that_comes_twice_is_named(raw):
    edit(raw / "coco/dataset_coco.json", lambda v: v["images"][1].update(imgid=0))
    assert "id 0: comes twice" in faults_of(opened(raw, "coco"))


@pytest.mark.parametrize(
    ("name", "path", "change", "message"),
    [
        (
            "coco_official",
            "coco/annotations/captions_train2014.json",
            lambda v: v["annotations"][0].update(image_id=999),
            "captions of image 999, which the file does not list",
        ),
        (
            "vqav2",
            "vqav2/v2_mscoco_train2014_annotations.json",
            lambda v: v["annotations"][0].update(question_id=7),
            "an annotation of question 7, which",
        ),
        (
            "vqav2",
            "vqav2/v2_mscoco_train2014_annotations.json",
            lambda v: v["annotations"].pop(),
            "no annotation of question 6000",
        ),
        (
            "vqav2",
            "vqav2/v2_mscoco_train2014_annotations.json",
            lambda v: v["annotations"][0].update(image_id=999),
            " is about image ",
        ),
        (
            "vqav2",
            "vqav2/v2_mscoco_val2014_annotations.json",
            lambda v: v.pop("annotations"),
            "nothing at 'annotations.item': is it another file, or another version?",
        ),
        (
            "coco",
            "coco/dataset_coco.json",
            lambda v: v["images"][0].update(split="training"),
            "entry 0 is of split 'training'; Karpathy's are train, restval, val, test",
        ),
        (
            "coco",
            "coco/dataset_coco.json",
            lambda v: v["images"][0].pop("sentences"),
            "entry 0 has no 'sentences'",
        ),
    ],
)
def test_annotations_that_do_not_fit_are_named(raw, name, path, change, message):
    """Annotations without an image, images without annotations, other versions of a file."""
    edit(raw / path, change)
    found = " ".join(str(faults_of(opened(raw, name), split)) for split in ("train", "validation"))
    assert message in found
    assert Path(path).name in found


def test_a_file_that_is_cut_off_is_named(raw):
    """JSON that ends in the middle; a line of NLVR2 that is none."""
    cut(raw / "coco/dataset_coco.json", 0.5)
    assert "dataset_coco.json: no JSON, or cut off" in faults_of(opened(raw, "coco"))
    cut(raw / "nlvr2/nlvr/nlvr2/data/train.json", 0.9)
    assert "train.json: line 6 is no JSON" in faults_of(opened(raw, "nlvr2"))


def test_the_first_version_of_vqa_is_told_apart(raw):
    for path in sorted((raw / "vqav2").glob("v2_*")):
        path.rename(path.with_name(path.name.removeprefix("v2_")))
    said = [missing.what for missing in opened(raw, "vqav2").missing()]
    assert "VQA of version 1 is here; it takes v2_*" in said


def test_a_map_of_another_size_and_a_map_alone_are_named(raw):
    """Label maps must have their image's size, an image, and no label beyond the classes."""
    maps = raw / "ade20k/ADEChallengeData2016/annotations/training"
    Image.new("L", (40, 48), 3).save(maps / "ADE_train_00000001.png")
    Image.new("L", (48, 48), 77).save(maps / "ADE_train_00000002.png")
    message = " ".join(
        str(faults_of(opened(raw, "ade20k"), split)) for split in ("train", "validation")
    )
    assert "ADE_train_00000001): a map of 40 x 48 pixels; its image has 48 x 48" in message
    assert "ADE_train_00000002): label 77; there are classes 1 to 40" in message
    Image.new("L", (48, 48)).save(maps / "ADE_train_00000009.png")
    assert "ADE_train_00000009.png: a map without an image" in faults_of(opened(raw, "ade20k"))


def test_addresses_where_files_should_stand_are_refused(raw):
    """CC3M as its authors give it has no images: it says so."""
    path = raw / "cc3m/Train_GCC-training_output.csv"
    path.write_text("a cat\thttp://example.org/cat.jpg\n")
    assert "line 1 has an address, http://example.org/cat.jpg" in faults_of(opened(raw, "cc3m"))


def test_a_line_with_a_column_too_many_is_named(raw):
    path = raw / "cc3m/Train_GCC-training_output.csv"
    path.write_text("a cat\tcat.jpg\tmore\n")
    assert "line 1: 3 columns, not caption and file" in faults_of(opened(raw, "cc3m"))


def test_a_label_that_is_no_truth_value_is_named(raw):
    path = raw / "nlvr2/nlvr/nlvr2/data/train.json"
    first, *others = path.read_text().splitlines()
    entry = {**json.loads(first), "label": "maybe"}
    path.write_text("\n".join([json.dumps(entry), *others]))
    message = faults_of(opened(raw, "nlvr2"))
    assert f"{entry['identifier']}: label 'maybe' is neither True nor False" in message


def test_an_entry_that_is_no_pair_is_named(raw):
    edit(raw / "sbu/annot.json", lambda v: v[0].append("more"))
    assert r"annot.json: entry 0 is no pair [file, caption]" in faults_of(opened(raw, "sbu"))


def test_a_list_of_classes_without_its_header_is_named(raw):
    path = raw / "ade20k/ADEChallengeData2016/objectInfo150.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=r"objectInfo150\.txt: expected a header `Idx Ratio"):
        opened(raw, "ade20k").classes()


def test_more_held_out_than_there_is_is_refused(drawn_sets):
    for name in ("vqav2", "ade20k", "imagenet"):
        reader = open_set(name, drawn_sets / name, held_out=6)
        with pytest.raises(DataError, match="leave none to train on: lower held_out"):
            list(reader.rows("train"))


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(DataError, match="format 'coca' is unknown: did you mean 'coco'"):
        open_set("coca", tmp_path)


def shard(path: Path, columns: dict, *, as_file: bool = True) -> None:
    """An Arrow file as vl-merging's writers write it."""
    table = pa.table(columns)
    make = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)


def jpeg(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(content, "JPEG")
    return content.getvalue()


@pytest.mark.parametrize("as_file", [True, False])
def test_shards_of_vl_merging_are_read(tmp_path, as_file):
    """Captions, questions with scores and pairs, images within, in either of Arrow's formats."""
    for name in ("train", "restval", "val", "test"):
        columns = {"image": [jpeg(9)], "caption": [["a", "b"]], "image_id": ["1"], "split": [name]}
        shard(tmp_path / f"coco_caption_karpathy_{name}.arrow", columns, as_file=as_file)
    reader = open_set("coco_shards", tmp_path)
    assert reader.missing() == []
    assert [row["captions"] for row in reader.rows("train")] == [["a", "b"]] * 2
    assert faults_of(reader) is None
    questions = {
        "image": [jpeg(n) for n in range(8)],
        "questions": [["what?", "where?"]] * 8,
        "answers": [[["cat", "dog"], ["here"]]] * 8,
        "answer_scores": [[[1.0, 0.3], [0.9]]] * 8,
        "question_id": [[2 * n, 2 * n + 1] for n in range(8)],
    }
    for name in ("vqav2_train", "vqav2_trainable_val", "vqav2_rest_val"):
        shard(tmp_path / f"{name}.arrow", questions, as_file=as_file)
    reader = open_set("vqav2_shards", tmp_path)
    first, second = list(reader.rows("train"))[:2]
    assert first["answers"] == ["cat"] * 4 + ["dog"]
    assert second["answers"] == ["here"] * 3
    held = [{row["id"] for row in reader.rows(split)} for split in ("validation", "test")]
    assert len(held[0] | held[1]) == 16
    assert not held[0] & held[1]
    pairs = {
        "image_0": [jpeg(1)],
        "image_1": [jpeg(2)],
        "questions": [["true?", "false?"]],
        "answers": [["True", "False"]],
        "identifier": ["dev-1-0"],
    }
    shard(tmp_path / "nlvr2_dev.arrow", pairs, as_file=as_file)
    rows = list(open_set("nlvr2_shards", tmp_path).rows("validation"))
    assert [row["label"] for row in rows] == [1, 0]


def test_shards_of_texts_alone_are_read(tmp_path):
    """VLMo's files of Wikipedia and BookCorpus: a sentence a row; empty lines are no rows."""
    for number in (0, 1):
        columns = {"image": ["None"] * 2, "caption": [[f"words {number}"], [" "]]}
        shard(tmp_path / f"wikibk_train_{number}.arrow", columns)
    reader = open_set("texts_shards", tmp_path)
    assert reader.missing() == []
    assert faults_of(reader) is None
    assert [row["text"] for row in reader.rows("train")] == ["words 0", "words 1"]


def test_a_shard_without_a_column_is_named(tmp_path):
    shard(tmp_path / "sbu_0.arrow", {"picture": [jpeg(1)], "caption": [["a"]]})
    with pytest.raises(DataError, match=r"sbu_0.arrow: row 0 has no column 'image'; it has pict"):
        list(open_set("sbu_shards", tmp_path).rows("train"))
    (tmp_path / "vg.arrow").write_bytes(b"no arrow")
    with pytest.raises(DataError, match=r"vg\.arrow: no Arrow file, or cut off"):
        list(open_set("visual_genome_shards", tmp_path).rows("train"))


def test_a_table_is_read_by_the_names_of_its_columns(tmp_path):
    """Parquet files of anybody, images as bytes; a column that is not there is named."""
    table = pa.table({"photo": [jpeg(3), jpeg(4)], "text": ["a cat", "a dog"]})
    pq.write_table(table, tmp_path / "train-0.parquet")
    options = {
        "kind": "captions",
        "files": {"train": "train-*.parquet"},
        "columns": {"image": "photo", "captions": "text"},
    }
    reader = open_set("columns", tmp_path, options=options)
    assert reader.missing() == []
    assert [row["captions"] for row in reader.rows("train")] == [["a cat"], ["a dog"]]
    assert faults_of(reader) is None
    wrong = options | {"columns": {"image": "foto", "captions": "text"}}
    with pytest.raises(DataError, match="columns says 'foto', the table has photo, text"):
        list(open_set("columns", tmp_path, options=wrong).rows("train"))


def test_a_set_of_the_hub_is_streamed_by_the_names_of_its_columns(tmp_path, monkeypatch):
    """By its address and splits of its own; one that cannot be opened is named."""
    monkeypatch.chdir(tmp_path)
    Path("org/set").mkdir(parents=True)
    table = pa.table({"photo": [jpeg(3), jpeg(4)], "kind_of_thing": [1, 0]})
    pq.write_table(table, "org/set/test-0.parquet")
    options = {
        "kind": "classes",
        "hub": "org/set",
        "splits": {"train": "test"},
        "columns": {"image": "photo", "label": "kind_of_thing"},
        "classes": ["cat", "dog"],
    }
    reader = open_set("columns", tmp_path, options=options)
    assert reader.missing() == []
    assert [row["label"] for row in reader.rows("train")] == [1, 0]
    assert faults_of(reader) is None
    few = open_set("columns", tmp_path, options=options | {"classes": ["cat"]})
    assert "id 0: label 1 of 1 classes" in faults_of(few)
    elsewhere = options | {"splits": {"train": "nowhere"}}
    with pytest.raises(DataError, match=r"^org/set: split 'nowhere' cannot be opened: "):
        list(open_set("columns", tmp_path, options=elsewhere).rows("train"))


def test_a_class_of_validation_images_that_training_lacks_is_named(raw):
    """ImageNet's folders: a class without training images has no number."""
    (first, *_) = sorted((raw / "imagenet/val").iterdir())
    first.rename(first.with_name("n99999999"))
    with pytest.raises(DataError, match=r"class 'n99999999' has no folder of training images"):
        list(opened(raw, "imagenet").rows("test"))


def test_questions_whose_answers_training_never_gives_are_named(tmp_path):
    """Answers outside the vocabulary score 0; a split of which most do was made for other data."""
    for split, answer in (("train", "cat"), ("validation", "dog"), ("test", "cat")):
        shade = 40 * len(split)
        rows = {"photo": [jpeg(shade), jpeg(shade + 1)], "said": [[answer], [answer]]}
        rows |= {"number": [f"{split}-7", f"{split}-8"], "text": ["what?", "who?"]}
        pq.write_table(pa.table(rows), tmp_path / f"{split}.parquet")
    columns = {"id": "number", "image": "photo", "text": "text", "answers": "said"}
    files = {split: f"{split}.parquet" for split in ("train", "validation", "test")}
    options = {"kind": "questions", "columns": columns, "files": files}
    entry = {"format": "columns", "root": str(tmp_path), "options": options, "image_size": 8}
    params = SetParams.model_validate(entry)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError) as refusal:
        prepare_set(tmp_path / "out", "vqav2", params, "raw", Look())
    lines = str(refusal.value).splitlines()
    assert "2 faults" in lines[0]
    assert lines[1].strip() == (
        "validation: question validation-7: none of its answers is among the 1 of training"
    )


def test_what_is_missing_is_said_with_who_has_it(raw):
    reader = opened(raw, "coco")
    (raw / "coco/dataset_coco.json").unlink()
    (missing,) = reader.missing()
    assert missing.what == "Karpathy's split"
    with pytest.raises(DataError, match=r"Get them from https://cocodataset\.org"):
        list(reader.rows("train"))
