"""Progress of a job as server-sent events: the video object whenever it has changed, until it has ended.

An event's id says how the job stood. A client that comes back with it (``Last-Event-ID``) is told only what has changed
since, by whichever process answers: nothing about a stream is kept.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from opensora.serve.jobs import FINISHED
from opensora.serve.web.auth import Client
from opensora.serve.web.service import Service
from opensora.serve.web.videos import show

LOOK_S = 0.3  # between looks at the queue
HEARTBEAT_S = 10.0  # a comment, so that nobody in between takes the connection for dead
RETRY_MS = 1000
MOST_STREAMS = 200  # at once


def mark_of(told: dict[str, Any]) -> str:
    """How a job stands, in one word."""
    more = told["x"]
    code = (told["error"] or {}).get("code", "")
    parts = (told["status"], more["attempt"], more["step"], told["progress"], more["queue_position"], code)
    return ".".join("" if part is None else str(part) for part in parts)


def look(service: Service, client: Client, id: str) -> tuple[dict[str, Any], bool] | None:
    """(the video object, whether it has ended); None: it is gone. Waits for the queue."""
    job = service.job(id, client.owner)
    return None if job is None else (show(service, job), job.state in FINISHED)


async def stream(service: Service, client: Client, id: str, last: str) -> AsyncIterator[str]:
    """Text of the stream. ``last``: id of the event that the client had last; "": none."""
    service.streams += 1
    try:
        yield f"retry: {RETRY_MS}\n\n"
        async for event in _changes(service, client, id, last):
            yield event
    finally:
        service.streams -= 1


async def _changes(service: Service, client: Client, id: str, last: str) -> AsyncIterator[str]:
    spoke = time.monotonic()
    while not service.stopping:
        found = await service.work(lambda: look(service, client, id))
        if found is None:
            yield f'event: deleted\ndata: {{"id": "{id}", "deleted": true}}\n\n'
            return
        told, ended = found
        mark = mark_of(told)
        if mark != last:
            yield f"id: {mark}\nevent: video\ndata: {json.dumps(told)}\n\n"
            last, spoke = mark, time.monotonic()
        if ended:
            return
        if time.monotonic() - spoke > HEARTBEAT_S:
            yield ": still there\n\n"
            spoke = time.monotonic()
        await asyncio.sleep(LOOK_S)
