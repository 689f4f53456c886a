"""Questions to a Prefect server, through Prefect's own client.

It waits and asks again where the server is too busy to answer, and signs in as Prefect's settings
say.
"""

import json
from collections.abc import Mapping


def ask(url: str, place: str, body: Mapping[str, object], method: str = "POST") -> list[dict]:
    """Ask the API at `url`, such as ``http://127.0.0.1:4200/api``, and return what it answers.

    Raises:
        ConnectionError: the server does not answer, or it refuses.
    """
    import httpx  # with Prefect; both take a second to import
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        try:
            answer = client.request(method, f"/{place}", json=dict(body))  # ty: ignore[invalid-argument-type]
        except httpx.HTTPError as error:
            raise ConnectionError(f"the Prefect server at {url}: {error}") from error
    return json.loads(answer.content or b"[]")
