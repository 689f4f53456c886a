"""A Hugging Face hub as a source; its revision is a commit."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from tasks.registry.secrets import without_secrets
from tasks.sources.source import (
    TIMEOUT_SECONDS,
    RemoteFile,
    Snapshot,
    SourceError,
    UnreachableError,
    again,
)


class Hub:
    """A Hugging Face hub; HF_ENDPOINT and HF_TOKEN say which and who asks."""

    def __init__(self, name: str, revision: str) -> None:
        self.revision = revision
        self._name = name
        self._endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        from huggingface_hub import HfApi

        with self._errors():
            info = again(
                lambda: HfApi(endpoint=self._endpoint).model_info(
                    self._name,
                    revision=self.revision,
                    files_metadata=True,
                    timeout=TIMEOUT_SECONDS,
                ),
                if_raised=self._transport_errors(),
            )
        return str(info.sha), [
            RemoteFile(
                path=file.rfilename,
                size=file.lfs.size if file.lfs else file.size or 0,
                sha256=file.lfs.sha256 if file.lfs else None,
                git_sha1=None if file.lfs else file.blob_id,
            )
            for file in info.siblings or []
        ]

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self._name, file.path, revision=snapshot.revision, endpoint=self._endpoint)
        headers = build_hf_headers() | {
            "Accept-Encoding": "identity",
            "Range": f"bytes={start}-{stop - 1}",
        }
        with (
            self._errors(),
            get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response,
        ):
            if response.status_code >= 500 or response.status_code == 429:
                raise ConnectionError(
                    f"{without_secrets(url)}: the hub answers {response.status_code}"
                )
            hf_raise_for_status(response)
            # A server that knows no ranges sends the file from its start.
            skip = start if response.status_code == 200 else 0
            wanted = stop - start
            for piece in response.iter_bytes():
                piece, skip = piece[skip:], max(0, skip - len(piece))
                yield piece[:wanted]
                wanted -= len(piece[:wanted])
                if wanted == 0:
                    return

    @staticmethod
    def _transport_errors() -> tuple[type[Exception], ...]:
        import httpx2

        return (httpx2.TransportError,)

    @contextmanager
    def _errors(self) -> Generator[None]:
        from huggingface_hub import errors

        name = f"hf://{self._name}@{self.revision}"
        endpoint = without_secrets(self._endpoint)
        try:
            yield
        except errors.RevisionNotFoundError as error:
            raise SourceError(
                f"{name}: the hub at {endpoint} has {self._name} but no revision "
                f"{self.revision!r}; name a branch, tag or commit that it has"
            ) from error
        except errors.GatedRepoError as error:
            raise SourceError(
                f"{name}: access has to be asked for on the hub first, then set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise SourceError(
                f"{name}: the hub at {endpoint} has no such repository, "
                "or it is private and HF_TOKEN is missing or not allowed to read it"
            ) from error
        except (errors.OfflineModeIsEnabled, *self._transport_errors()) as error:
            raise UnreachableError(
                f"{name}: no answer from {endpoint} ({without_secrets(str(error))}); "
                "check the network and HF_ENDPOINT, or use a local folder"
            ) from error
        except errors.HfHubHTTPError as error:
            reason = without_secrets(str(error))
            raise SourceError(f"{name}: the hub refuses: {reason}") from error
