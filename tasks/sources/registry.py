"""A registered model of MLflow as a source; its revision is a version number."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from tasks.sources.folder import Folder
from tasks.sources.source import RemoteFile, Snapshot, SourceError


class Registry:
    """A registered model of MLflow; the folder with config.json is its checkpoint."""

    def __init__(self, name: str, *, alias: str | None, version: str | None) -> None:
        self._name = name
        self._alias = alias
        self._version = version

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        from tasks.registry import tracking

        version = self._version or tracking.version_of(self._name, str(self._alias))
        sizes = tracking.model_files(self._name, version)
        folders = [path.removesuffix("config.json") for path in sizes if _is_config(path)]
        if len(folders) != 1:
            raise SourceError(
                f"mlflow:models/{self._name}/{version}: expected one folder with config.json, "
                f"found {sorted(folders) or 'none'}"
            )
        return version, [
            RemoteFile(path=path.removeprefix(folders[0]), size=size, key=path)
            for path, size in sizes.items()
            if path.startswith(folders[0])
        ]

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        from tasks.registry import tracking

        with tracking.model_file(self._name, snapshot.revision, str(file.key)) as path:
            yield from Folder(path.parent).read(
                snapshot, file.model_copy(update={"path": path.name}), start, stop
            )


def _is_config(path: str) -> bool:
    return PurePosixPath(path).name == "config.json"
