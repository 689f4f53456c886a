"""The form in which MLflow saves a model: signature, example, and the flavours that load it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

WEIGHTS = (".safetensors", ".safetensors.index.json")  # no part of a processor


def signature(
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    options: Mapping[str, str | int],
):
    """The signature of a served model, of which no column is required; None of another."""
    from mlflow.models import ModelSignature

    if not inputs:
        return None
    return ModelSignature(_schema(inputs), _schema(outputs), _option_schema(options))


class Flavours:
    """Saves a model as a Python function and, with `entry`, as one of transformers.

    Both read the same files, which are copied and never loaded.
    """

    __name__ = "pyfunc"

    def __init__(self, entry: Mapping[str, object] | None, components: Mapping[str, Path]) -> None:
        self.entry, self.components = entry, components

    def save_model(self, path, mlflow_model, *, validate_serving_input, **given) -> None:
        import mlflow

        mlflow.pyfunc.save_model(path=path, mlflow_model=mlflow_model, **given)
        if self.entry is None:
            return
        for name, folder in self.components.items():
            place = Path(path) / "components" / name
            place.mkdir(parents=True)
            for file in sorted(folder.iterdir()):
                if file.is_file() and not file.name.endswith(WEIGHTS):
                    shutil.copy(file, place)
        mlflow_model.add_flavor("transformers", **self.entry)
        mlflow_model.save(str(Path(path) / "MLmodel"))


def _schema(columns: Sequence[tuple[str, str]]):
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    def type_of(name: str):
        scalar = DataType[name.removesuffix("[]")]
        return Array(scalar) if name.endswith("[]") else scalar

    return Schema([ColSpec(type_of(kind), name, required=False) for name, kind in columns])


def _option_schema(options: Mapping[str, str | int]):
    from mlflow.types import DataType, ParamSchema, ParamSpec

    return ParamSchema(
        [
            ParamSpec(name, DataType.long if isinstance(value, int) else DataType.string, value)
            for name, value in options.items()
        ]
    )


def frame(example: Mapping[str, object]):
    from pandas import DataFrame

    return DataFrame([dict(example)])
