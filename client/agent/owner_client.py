"""The owner's commands, said to the agent that runs, or to one that runs for as long as a command does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from florilegium.client.agent.errors import RefusedError
from florilegium.client.agent.folder import DeviceFolder

PATIENCE_S = 3600.0
Json = Any  # type: ignore[explicit-any]  # an answer, as httpx reads it


class OwnerClient:
    """An agent behind its socket."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def read(self, path: str) -> Json:
        """What the agent knows."""
        return _checked(self._client.get(f"http://agent/api/{path}")).json()

    def write(self, path: str, **body: object) -> Json:
        """What came of something that was to be done at once."""
        return _checked(self._client.post(f"http://agent/api/{path}", json=body)).json()

    def stream(self, path: str, **body: object) -> Iterator[dict[str, Json]]:
        """What the agent tells while it works; the last is what came of it, under "done"."""
        with self._client.stream("POST", f"http://agent/api/{path}", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                _checked(response)
            for line in response.iter_lines():
                told = json.loads(line)
                if "error" in told:
                    raise RefusedError(told["error"])
                yield told

    def export(self, *, gguf: bool = False) -> bytes:
        """All that is the owner's, as a zip; with `gguf` the adapters as llama.cpp reads them too."""
        return _checked(self._client.get(f"http://agent/api/export{'?gguf' if gguf else ''}")).content


@contextmanager
def reached(folder: DeviceFolder) -> Iterator[OwnerClient]:
    """The agent of a folder: the one that runs, else one that is started here and ends with this."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(folder.socket)), timeout=PATIENCE_S) as client:
        try:
            client.get("http://agent/api/consents")
        except httpx.ConnectError:
            from florilegium.client.agent.daemon import opened  # with it the model's libraries

            with opened(folder):
                yield OwnerClient(client)
            return
        yield OwnerClient(client)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.status_code != httpx.codes.OK:
        raise RefusedError(str(response.json().get("error", response.status_code)))
    return response
