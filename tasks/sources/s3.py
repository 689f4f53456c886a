"""The S3 client, and what boto3 raises in our words."""

import os
from collections.abc import Generator
from contextlib import contextmanager

from tasks.registry.secrets import without_secrets
from tasks.sources.source import TIMEOUT_SECONDS, SourceError, UnreachableError

_CONNECT_SECONDS = 5

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) to a key that it knows"
)
_S3_REASONS = {
    "InvalidAccessKeyId": f"this access key is unknown there; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret does not belong to this access key; {_CREDENTIALS}",
    "AccessDenied": f"these credentials may not do this; {_CREDENTIALS}",
    "403": f"these credentials may not do this; {_CREDENTIALS}",
    "NoSuchBucket": "there is no such bucket",
    "NoSuchKey": "there is no such object",
    "NoSuchVersion": "this version is gone; resolve the source again",
    "404": "there is no such object",
    "PreconditionFailed": "it was changed meanwhile; run the stage again",
    "412": "it was changed meanwhile; run the stage again",
}
_S3_PASSING = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "500", "503"}


def s3_client():
    """A client that retries requests; `tasks.sources.transfer` goes on with broken bodies."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    return session.client(
        "s3",
        region_name=session.region_name or "us-east-1",
        config=Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=TIMEOUT_SECONDS,
            retries={"max_attempts": 3, "mode": "standard"},
        ),
    )


@contextmanager
def s3_errors(name: str) -> Generator[None]:
    """Name the place in the errors of boto3, its answer, and what would be right."""
    from botocore import exceptions
    from urllib3.exceptions import HTTPError

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    where = without_secrets(endpoint)
    try:
        yield
    except exceptions.ClientError as error:
        code = error.response["Error"].get("Code", "")
        reason = _S3_REASONS.get(code) or without_secrets(str(error))
        message = f"{name} at {where}: {code}: {reason}"
        if code in _S3_PASSING:
            raise ConnectionError(message) from error
        raise SourceError(message) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise SourceError(f"{name} at {where}: {_CREDENTIALS}") from error
    except (
        exceptions.IncompleteReadError,
        exceptions.ReadTimeoutError,
        exceptions.ResponseStreamingError,
        HTTPError,
    ) as error:
        raise ConnectionError(f"{name} at {where}: {without_secrets(str(error))}") from error
    except (exceptions.HTTPClientError, exceptions.EndpointConnectionError) as error:
        raise UnreachableError(
            f"{name}: no answer from {where}; check the network and AWS_ENDPOINT_URL "
            f"({without_secrets(str(error))})"
        ) from error
