"""Addresses of MLflow's pages, and a document that leads to one."""

import os
from html import escape
from urllib.parse import urlsplit

MLFLOW = "http://127.0.0.1:5000"  # where `make ui` shows it


def version_page(name: str, number: str) -> str:
    """The address of a model's version among MLflow's pages."""
    return f"{mlflow_pages()}/#/models/{name}/versions/{number}"


def mlflow_pages() -> str:
    """The address of MLflow's pages, without what may be secret in it."""
    address = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if address.scheme not in ("http", "https") or not address.hostname:
        return MLFLOW
    port = f":{address.port}" if address.port else ""
    return f"{address.scheme}://{address.hostname}{port}{address.path.rstrip('/')}"


def forward(address: str, words: str) -> str:
    """An HTML document that leads to an address at once."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(words)}</title>"
        f'<meta http-equiv="refresh" content="0; url={escape(address)}"></head>'
        f'<body><p><a href="{escape(address)}">{escape(words)}</a></p></body></html>\n'
    )
