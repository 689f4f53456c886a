"""The formats of data sets by name, and a set of a recipe opened by one of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alloy.errors import nearest
from tasks.data.archives.ade20k import Ade20k
from tasks.data.archives.coco import Coco, CocoOfficial, Flickr30k
from tasks.data.archives.columns import (
    Cc3mShards,
    CocoShards,
    Columns,
    FlickrShards,
    Nlvr2Shards,
    SbuShards,
    TextShards,
    VgShards,
    VqaShards,
)
from tasks.data.archives.corpora import Cc3m, ImageNet, Sbu, Texts, VisualGenome
from tasks.data.archives.nlvr2 import Nlvr2
from tasks.data.archives.reader import Reader
from tasks.data.archives.vqa import Vqav2
from tasks.data.sets.rows import DataError, Kind

FORMATS: Mapping[str, type[Reader]] = {
    "coco": Coco,
    "coco_official": CocoOfficial,
    "flickr30k": Flickr30k,
    "vqav2": Vqav2,
    "nlvr2": Nlvr2,
    "ade20k": Ade20k,
    "visual_genome": VisualGenome,
    "sbu": Sbu,
    "cc3m": Cc3m,
    "imagenet": ImageNet,
    "texts": Texts,
    "coco_shards": CocoShards,
    "flickr30k_shards": FlickrShards,
    "vqav2_shards": VqaShards,
    "nlvr2_shards": Nlvr2Shards,
    "visual_genome_shards": VgShards,
    "sbu_shards": SbuShards,
    "cc3m_shards": Cc3mShards,
    "texts_shards": TextShards,
    "columns": Columns,
}


def open_set(
    form: str, root: Path, held_out: int = 1000, options: Mapping[str, Any] | None = None
) -> Reader:
    """The reader of a set by its format's name.

    Raises:
        DataError: no such format.
    """
    if form not in FORMATS:
        raise DataError(f"format {form!r} is unknown: {nearest(form, list(FORMATS))}")
    return FORMATS[form](root, held_out, options or {})


def kind_of(reader: Reader) -> Kind:
    """The kind of a set's rows; a table of columns says it itself."""
    return reader.of_kind if isinstance(reader, Columns) else reader.kind
