"""A result of any family is registered for what it is: served, and loaded by transformers."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import yaml
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tasks import storage
from tasks.recipe.load import load as load_recipe
from tasks.registry import register, tracking
from tasks.registry.families import family_of
from tests import multimodal, servers, tiny_models
from tests.tasks.registry.served import picture

with warnings.catch_warnings():  # MLflow's own, at its import
    warnings.simplefilter("ignore")
    from tasks.registry.serving import BadRequestError, ServedModel

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
TEXT = {**SIZES, "vocab_size": tiny_models.SIZE, "max_position_embeddings": 16,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
SIDE = {"height": 8, "width": 8}


SEEN = "<image>"


def llava() -> LlavaForConditionalGeneration:
    tower = {**IMAGE, "model_type": "clip_vision_model", "projection_dim": 6}
    text = {**TEXT, "model_type": "llama", "vocab_size": tiny_models.SIZE + 1}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=tiny_models.SIZE)
    )


def joint_processor() -> LlavaProcessor:
    """Pictures of four patches, each of which stands as a token in the text."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [SEEN]})
    pictures = CLIPImageProcessor(size=SIDE, do_center_crop=False)
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=4, image_token=SEEN,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=6))


MODELS: dict[str, tuple[Callable, list[str]]] = {
    "generation": (lambda: LlamaForCausalLM(LlamaConfig(**TEXT)), ["text"]),
    "classes": (lambda: ViTForImageClassification(ViTConfig(**IMAGE)), ["image"]),
    "text classes": (lambda: BertForSequenceClassification(BertConfig(**TEXT)), ["text"]),
    "embeddings": (lambda: BertModel(BertConfig(**TEXT)), ["text"]),
    "towers": (clip, ["image", "text"]),
    "replies": (llava, ["image", "text"]),
    "words": (lambda: BertForMaskedLM(BertConfig(**TEXT)), ["text"]),
}
RECIPE = {
    "kind": "models",
    "fetch": {"checkpoints": {"a": "given/a", "b": "given/b"}},
    "members": ["a", "b"],
    "merge": {"result": "average", "arms": {"average": {"method": "linear"}}},
    "evaluate": {"tssd_keep": 0.2},
    "register": {"name": "mine", "model": "merged"},
}


def write_model(kind: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    make, reads = MODELS[kind]
    model = make().eval()
    model.save_pretrained(folder)
    if "text" in reads:
        tokenizer = tiny_models.tokenizer()
        tokenizer.eos_token = "[SEP]"
        tokenizer.save_pretrained(folder)
    if kind == "replies":
        joint_processor().save_pretrained(folder)
    elif reads == ["image"]:
        ViTImageProcessor(size=SIDE).save_pretrained(folder)
    elif "image" in reads:
        CLIPImageProcessor(size=SIDE, do_center_crop=False).save_pretrained(folder)
    return model


@pytest.fixture
def registered(mlflow_workspace: Path) -> Callable[[str], torch.nn.Module]:
    """Register a result of a family as `models:/mine@challenger`; the model."""
    (mlflow_workspace / "params").mkdir()
    (mlflow_workspace / "params/recipes.yaml").write_text("recipes: [mine]\n")
    (mlflow_workspace / "params/mine.yaml").write_text(yaml.safe_dump(RECIPE))

    def make(kind: str) -> torch.nn.Module:
        model = write_model(kind, Path("models/mine/merged"))
        storage.write_json(Path("reports/mine/metrics.json"), {"a - b": {"l2": 1.0}})
        register.main(load_recipe("mine"))
        mlflow.set_tracking_uri(tracking.uri())
        return model

    return make


def rows(kind: str) -> pd.DataFrame:
    texts = ["a [MASK] c", "[MASK]"] if kind == "words" else ["a b c", "d"]
    columns = {"image": [picture(0, 8)[0], picture(1, 8)[0]], "text": texts}
    return pd.DataFrame({name: columns[name] for name in MODELS[kind][1]})


def expected(kind: str, model, texts: list[str]) -> list:
    """What the model itself says of the rows of `rows`."""
    tokenizer = tiny_models.tokenizer()
    words = tokenizer(texts, padding=True, return_tensors="pt")
    pixels = [picture(seed, 8)[1] for seed in (0, 1)]
    with torch.no_grad():
        if kind == "text classes":
            return model(**words).logits.softmax(1).max(1).values.tolist()
        if kind == "classes":
            seen = ViTImageProcessor(size=SIDE)(images=pixels, return_tensors="pt")
            return model(**seen).logits.softmax(1).max(1).values.tolist()
        if kind == "words":
            masked = tokenizer(list(rows(kind)["text"]), padding=True, return_tensors="pt")
            best = model(**masked).logits.softmax(2).max(2)
            return [tokenizer.decode(best.indices[0, 2]), tokenizer.decode(best.indices[1, 1])]
        if kind == "replies":
            replies = []
            for text, seen in zip(texts, pixels, strict=True):
                one = joint_processor()(
                    text=[f"{SEEN}\n{text}"], images=[seen], return_tensors="pt"
                )
                ids = model.generate(**one, max_new_tokens=3, do_sample=False)
                new = ids[0, one["input_ids"].shape[1] :]
                replies.append(joint_processor().decode(new, skip_special_tokens=True))
            return replies
        if kind == "embeddings":
            states, mask = model(**words).last_hidden_state, words["attention_mask"][..., None]
            return ((states * mask).sum(1) / mask.sum(1)).tolist()
        if kind == "generation":
            new = []
            for text in texts:
                one = tokenizer([text], return_tensors="pt")["input_ids"]
                ids = model.generate(input_ids=one, max_new_tokens=3, do_sample=False)
                new.append(tokenizer.decode(ids[0, one.shape[1] :], skip_special_tokens=True))
            return new
        processor = CLIPImageProcessor(size=SIDE, do_center_crop=False)
        seen = processor(images=pixels, return_tensors="pt")
        own = {name: words[name] for name in ("input_ids", "attention_mask")}
        whole = model(**own, pixel_values=seen["pixel_values"])
        return (whole.text_embeds @ whole.image_embeds.T).tolist()


VALUE = {"generation": "text", "classes": "score", "text classes": "score",
         "embeddings": "embedding", "towers": "scores", "replies": "text",
         "words": "words"}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("generation", "towers") else [pytest.mark.slow])
        for kind in MODELS
    ],
)
def test_a_family_answers_its_rows_and_transformers_loads_it(registered, kind: str) -> None:
    """The Python function says what the model says; the transformers flavour gives the model."""
    model = registered(kind)
    address = "models:/mine@challenger"
    served = mlflow.pyfunc.load_model(address)
    example = served.metadata.load_input_example()
    assert list(example.columns) == MODELS[kind][1]
    served.predict(example)
    params = {"max_new_tokens": 3} if "max_new_tokens" in str(served.metadata.signature) else None
    answers = [row[VALUE[kind]] for row in served.predict(rows(kind), params=params)]
    found = expected(kind, model, ["a b c", "d"])
    if kind in ("generation", "replies"):
        assert answers == found
    elif kind == "words":
        assert [word for words in answers for word in words] == found
    else:
        np.testing.assert_allclose(answers, found, atol=1e-5)
    if kind == "towers":
        both = served.predict(rows(kind), params={"output": "embeddings"})
        assert np.linalg.norm([row["text_embedding"] for row in both], axis=1) == pytest.approx(1)
    loaded = mlflow.transformers.load_model(address, return_type="components")
    for name, tensor in loaded["model"].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    place = Path(mlflow.artifacts.download_artifacts(address)) / "artifacts/merged"
    _, info = type(model).from_pretrained(place, output_loading_info=True)
    assert not any(info.values())
    if kind == "replies":  # MLflow makes no pipelines of what has a joint processor
        parts = {name: loaded[name] for name in ("model", "processor")}
        pipeline = transformers.pipeline("image-text-to-text", **parts)
    else:
        pipeline = mlflow.transformers.load_model(address)
    assert isinstance(pipeline, transformers.Pipeline)


def served_here(kind: str, folder: Path) -> Callable:
    """The served code's predict for a model of a family, without MLflow's registry."""
    model, served = write_model(kind, folder), ServedModel()
    found = family_of(folder)
    assert found is not None
    context = SimpleNamespace(
        artifacts={"checkpoint": str(folder)}, model_config={"family": found.name}
    )
    served.load_context(context)
    return lambda table, params=None: (served.predict(context, table, params), model)


@pytest.mark.parametrize("kind", ["classes", "text classes", "embeddings"])
def test_the_served_code_says_what_the_model_says(tmp_path, kind: str) -> None:
    answers, model = served_here(kind, tmp_path)(rows(kind))
    values = [row[VALUE[kind]] for row in answers]
    np.testing.assert_allclose(values, expected(kind, model, ["a b c", "d"]), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "row", "params", "message"),
    [
        ("generation", {"text": "a " * 40}, {}, "row 0: text has 42 tokens, the model takes 1 to"),
        ("generation", {"text": None}, {}, "row 0 has no text"),
        ("generation", {"text": "a"}, {"max_new_tokens": 0}, "a number from 1 to 1024"),
        ("generation", {"text": "a"}, {"max_new_tokens": 9999}, "a number from 1 to 1024"),
        ("generation", {"text": "a"}, {"max_tokens": 1}, "choose of .'max_new_tokens'"),
        ("classes", {"image": "no base64!"}, {}, "row 0: image is not base64"),
        ("towers", {"text": "a"}, {}, "row 0 has no image"),
        ("words", {"text": "a"}, {}, r"row 0: text has no \[MASK\]"),
        ("replies", {"text": "<image> a"}, {}, "text has '<image>', which stands for the image"),
        ("replies", {"image": picture(0, 8)[0]}, {}, "row 0 has no text"),
        ("replies", {"text": "a " * 40}, {}, "row 0: text has 42 tokens, the model takes 1 to 16"),
        ("towers", {"image": None, "text": None}, {"output": "embeddings"}, "neither image nor"),
        ("towers", {"text": "a"}, {"output": "poems"}, "'poems' is unknown; choose one of"),
    ],
)
def test_requests_that_a_family_cannot_answer_are_refused(
    tmp_path, kind, row, params, message
) -> None:
    """As those of modality transformers, with the number of the row."""
    with pytest.raises(BadRequestError, match=message):
        served_here(kind, tmp_path)(pd.DataFrame([row]), params)


def test_a_model_of_no_family_is_kept_to_be_loaded(tmp_path) -> None:
    """Masked words without a mask have a task and are not served; a head alone has no task."""
    tiny_models.save(tiny_models.model("DistilBertForMaskedLM", 0), tmp_path / "words")
    settings = tmp_path / "words/tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"mask_token"', '"no_mask_token"'))
    found = family_of(tmp_path / "words")
    assert found is not None
    assert (found.name, found.task) == (None, "fill-mask")
    MODELS["classes"][0]().save_pretrained(tmp_path / "bare")
    assert family_of(tmp_path / "bare") is None


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL"])
def test_a_reader_of_films_answers_images_without_torchvision(name: str, tmp_path, capsys) -> None:
    """Each row's reply is the model's own to as many image tokens as its processor makes patches.

    With torchvision, a served version's requirements name it.
    """
    tokenizer = tiny_models.tokenizer()
    seen = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": seen})
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    model = multimodal.whole(name)
    for key, token in zip(("image", "vision_start", "vision_end", "video"), seen, strict=True):
        setattr(model.config, f"{key}_token_id", tokenizer.convert_tokens_to_ids(token))
    model.save_pretrained(tmp_path)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64}
    named = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**sizes, **named}))
    found = family_of(tmp_path)
    assert found is not None
    assert (found.name, found.task) == ("replies", "image-text-to-text")
    films = find_spec("torchvision") is not None
    assert found.packages == (("torchvision",) if films else ())
    assert ("install torchvision" in capsys.readouterr().out) == (not films)
    served = ServedModel()
    settings = {"artifacts": {"checkpoint": str(tmp_path)}, "model_config": {"family": "replies"}}
    served.load_context(SimpleNamespace(**settings))
    table = pd.DataFrame({"image": [picture(0, 8)[0], None], "text": ["a b c", "d"]})
    answers = served.predict(SimpleNamespace(**settings), table, {"max_new_tokens": 3})
    pixels = Qwen2VLImageProcessorPil(**sizes)(images=[picture(0, 8)[1]], return_tensors="pt")
    num_tokens = int(pixels["image_grid_thw"].prod()) // 4
    for text, given, answer in (
        (f"{seen[0] * num_tokens}\na b c", pixels, answers[0]),
        ("d", {}, answers[1]),
    ):
        words = tokenizer([text], return_tensors="pt")
        ids = words["input_ids"]
        kinds = {"mm_token_type_ids": (ids == model.config.image_token_id).int()} if given else {}
        new = model.generate(**words, **given, **kinds, max_new_tokens=3, do_sample=False)
        said = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["text"] == said


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_mlflow_serves_each_family_over_http(registered, tmp_path, kind: str) -> None:
    """A real request to `mlflow models serve`, in a folder without this repository on its path."""
    model = registered(kind)
    port = servers.free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", "models:/mine@challenger", "-p", str(port), "-h", "127.0.0.1"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking.uri(), "PATH": path}
    environment.pop("PYTHONPATH", None)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=elsewhere, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        servers.wait_for_port(port, process, seconds=300)
        body = {"dataframe_records": rows(kind).to_dict("records")}
        if kind in ("generation", "replies"):
            body["params"] = {"max_new_tokens": 3}
        answers = servers.post(port, body)["predictions"]
        found = expected(kind, model, ["a b c", "d"])
        values = [row[VALUE[kind]] for row in answers]
        if kind in ("generation", "replies"):
            assert values == found
        elif kind == "words":
            assert [word for words in values for word in words] == found
        else:
            np.testing.assert_allclose(values, found, atol=1e-5)
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


REGISTERS = """
import resource, sys, threading
from pathlib import Path
from tasks.recipe.load import load
from tasks.registry import register
register.main(load("mine"))
peak = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
print("PEAK", int(peak.split()[1]) // 1024)
"""


@pytest.mark.slow
def test_four_gigabytes_are_registered_in_less_than_one(registered, mlflow_workspace) -> None:
    """Files are copied, never loaded: a sparse file of 4 GB stands for the weights."""
    registered("generation")
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}
    ).encode()
    weights = Path("models/mine/merged/model.safetensors")
    with weights.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**32)
    done = subprocess.run([sys.executable, "-c", REGISTERS], capture_output=True, text=True)
    assert "registered mine version 2" in done.stdout, done.stderr
    assert int(done.stdout.split("PEAK ")[1]) < 1024
    assert tracking.model_files("mine", "2")["artifacts/merged/model.safetensors"] > 2**32
