"""Checks of benchmarks before the first stage: files, columns, programs, tasks of harnesses."""

from pathlib import Path

from alloy.errors import nearest
from tasks.data.hub import refuse_unknown
from tasks.data.inputs import ExamplesError, files_of
from tasks.models.benchmarks import command, harness
from tasks.models.benchmarks.examples import of_folders
from tasks.recipe.benchmarks import MeasuredParams, ModelsExamples
from tasks.recipe.section import ParamsError


def check_benchmarks(where: str, params: MeasuredParams) -> None:
    """Refuse benchmarks that could not be measured, whatever the models.

    Raises:
        ParamsError: names the key, and what would be right.
    """
    for name, own in params.benchmarks.items():
        try:
            _check(f"{where}.benchmarks.{name}", own)
        except ExamplesError as error:
            raise ParamsError(str(error)) from error
    if params.harness is not None:
        for kind in ("lm_eval", "mteb"):
            if (section := getattr(params.harness, kind)) is not None:
                harness.refuse_missing(f"{where}.harness.{kind}", kind, section)


def _check(where: str, own: ModelsExamples) -> None:
    if own.command is not None:
        command.refuse_missing(where, own.command)
    elif own.texts is not None:
        files_of(where, Path(own.texts), (".txt",))
    elif own.images is not None:
        of_folders(where, Path(own.images), None)
    elif own.dataset is not None:
        refuse_unknown(where, own.dataset)
        path = Path(own.dataset)
        if "://" not in own.dataset and not path.exists():
            raise ExamplesError(f"{where}: {path} is not there")
        if path.suffix == ".parquet" and path.is_file():
            _check_columns(where, own, path)


def _check_columns(where: str, own: ModelsExamples, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except pyarrow.ArrowInvalid as error:
        raise ExamplesError(f"{where}: {path} is no parquet file: {error}") from error
    for key in ("column", "labels", "captions"):
        column = getattr(own, key)
        if column is not None and column not in names:
            raise ParamsError(f"{where}.{key}: {column!r}: {nearest(column, names)}")
