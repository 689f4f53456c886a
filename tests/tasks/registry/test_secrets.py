"""Passwords, tokens and signatures never reach what somebody reads, whatever the address."""

import logging
import subprocess
import sys

import pytest

from tasks.registry.secrets import without_secrets

ADDRESS = "postgresql://user:S3cret@host/db"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        # an address with a user
        ("http://user:S3cret@host:5000/path", "http://***@host:5000/path"),
        ("https://S3cret@host/path", "https://***@host/path"),
        (
            "postgresql+psycopg2://user:S3cret@host:5432/db",
            "postgresql+psycopg2://***@host:5432/db",
        ),
        ("mysql://user:S3cret@host/db?ssl_ca=/a", "mysql://***@host/db?***"),
        ("mssql://user:S3@cret@host/db", "mssql://***@host/db"),
        ("postgresql://user:S3/cret@host/db", "postgresql://***@host/db"),
        ("postgresql://user:S3?cret@host/db", "postgresql://***"),
        ("redis://:S3cret@host:6379/0", "redis://***@host:6379/0"),
        ("unheard-of://user:S3cret@host/db", "unheard-of://***@host/db"),
        ("s3://key:S3cret@bucket/prefix", "s3://***@bucket/prefix"),
        ("hf://user:S3cret@org/name", "hf://***@org/name"),
        ("user:S3cret@host/db", "***@host/db"),
        ("it is at 'user:S3cret@host/db'; look", "it is at '***@host/db'; look"),
        # a token in the place of a host
        ("databricks://dapiS3cret", "databricks://***"),
        ("DATABRICKS://S3cret", "DATABRICKS://***"),
        ("databricks-uc://S3cret:prefix", "databricks-uc://***"),
        # a query
        ("https://host/a?X-Amz-Signature=S3cret&X-Amz-Expires=9", "https://host/a?***"),
        ("https://host/a?sig=S3cret", "https://host/a?***"),
        ("https://host/a#access_token=S3cret", "https://host/a#***"),
        ("url: /a?X-Amz-Signature=S3cret&X-Amz-Expires=9", "url: /a?X-Amz-Signature=***&X-Amz-Exp"),
        ("X-Amz-Security-Token=S3cret", "X-Amz-Security-Token=***"),
        ("AccountName=me;AccountKey=S3cret==;", "AccountName=me;AccountKey=***;"),
        ("odbc: UID=me;PWD=S3cret;Port=1", "odbc: UID=me;PWD=***;Port=1"),
        # a header, a bare token
        ("{'authorization': 'Bearer S3cret'}", "{'authorization': 'Bearer ***'}"),
        ("Authorization: Basic S3cret==", "Authorization: Basic ***"),
        ("Bearer S3cret refused", "Bearer *** refused"),
        ("the token hf_S3cretS3cret is wrong", "the token *** is wrong"),
        # two in one sentence
        ("http://u:S3cret@a: (ftp://u:S3cret@b)", "http://***@a: (ftp://***@b)"),
    ],
)
def test_a_secret_gives_way_to_the_mask(text: str, masked: str) -> None:
    assert "S3" not in without_secrets(text)
    assert "cret" not in without_secrets(text)
    assert masked in without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name@revision",
        "hf://gpt2@main",
        "hf://org/toy@main: the hub at http://127.0.0.1:9 has org/toy but no revision 'main'",
        "mlflow:models/name@champion",
        "models:/toy-model@challenger",
        "s3://bucket/prefix: NoSuchBucket: there is no such bucket",
        "sqlite:////a/mlflow.db",
        "http://127.0.0.1:5000/path",
        "http://[::1]:5000/path",
        "see https://host/auth.html#credentials",
        "params/toy.yaml: fetch.checkpoints.a: revision is missing",
        "the secret does not belong to this access key",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "source 'mlflow:toy@champion' is unknown",
        "stage: 'dvc.yaml:merge@toy' did not change",
        "../dvc.yaml:merge@toy",
        "pad_token=<pad>, eos_token=</s>",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "a value of no known form", "a value of no known form"),
        ("AWS_SECRET_ACCESS_KEY", "abc/def+ghi", "abc/def+ghi"),
        ("MLFLOW_TRACKING_PASSWORD", "open sesame", "open sesame"),
        ("PREFECT_API_KEY", "open sesame", "open sesame"),
        ("PREFECT_API_AUTH_STRING", "admin:sesame", "admin:sesame"),
        ("MLFLOW_TRACKING_URI", "postgresql://user:pass'word one@host/db", "pass'word one"),
        ("MLFLOW_TRACKING_URI", "postgresql://user:pass%2Fword@host/db", "pass/word"),
        ("MLFLOW_TRACKING_URI", "user:pass/word@host/db", "pass/word"),
        ("AWS_ENDPOINT_URL_S3", "http://user:pass'word@host", "pass'word"),
        ("HTTPS_PROXY", "http://user:pass'word@host", "pass'word"),
    ],
)
def test_a_value_of_the_environment_is_masked_wherever_it_stands(
    monkeypatch, name: str, value: str, secret: str
) -> None:
    monkeypatch.setenv(name, value)
    assert without_secrets(f"login with <{secret}> failed") == "login with <***> failed"
    assert secret not in without_secrets(f"no answer from {value}")


def test_any_logger_masks_messages_arguments_and_tracebacks(caplog) -> None:
    """Whoever logs; a record that holds no secret keeps its arguments."""
    logger = logging.getLogger("somebody.else")
    logger.warning("no answer from %s in %d s", ADDRESS, 5)
    logger.warning("no answer in %d s", 5)
    try:
        raise OSError(f"no answer from {ADDRESS}")
    except OSError:
        logger.exception("it failed")
    assert "no answer from postgresql://***@host/db in 5 s" in caplog.text
    assert "OSError: no answer from postgresql://***@host/db" in caplog.text
    assert "S3cret" not in caplog.text
    assert caplog.records[1].args == (5,)


def test_a_process_that_dies_of_an_error_tells_no_secret() -> None:
    code = f"import tasks\nraise RuntimeError('no answer from {ADDRESS}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: no answer from postgresql://***@host/db\n")
    assert "S3cret" not in done.stderr.partition("RuntimeError:")[2]
