"""What goes without being asked: jobs whose time is over, the oldest beyond the quota of bytes, jobs that were deleted
while they ran, and references of requests that never became a job.
"""

import asyncio
import os
import time
from collections.abc import Callable

from opensora.serve.jobs import FINISHED
from opensora.serve.web.service import Service
from opensora.serve.web.video_object import expiry
from opensora.serve.web.videos import ID, remove
from opensora.utils.console import announce

EVERY_S = 2.0  # deleted jobs that have ended
SELDOM = 5  # rounds until the rest is looked at
AT_ONCE = 16  # jobs of a round, for the quota
STRAY_S = 3600.0  # age of a reference without a job: its request has ended, whatever became of it


async def clean_forever(service: Service) -> None:
    """Until it is cancelled. What goes wrong is said, and tried again."""
    turn = 0
    while True:
        if turn % SELDOM == 0:
            await service.work(lambda: _careful(clean, service))
        await service.work(lambda: _careful(remove_marked, service))
        await asyncio.sleep(EVERY_S)
        turn += 1


def _careful(call: Callable[[Service, float], None], service: Service) -> None:
    try:
        call(service, time.time())
    except Exception as error:  # of the disk or the queue: the process goes on, and so does the next round
        announce(f"cleaning up failed, and is tried again: {type(error).__name__}")


def clean(service: Service, now: float) -> None:
    """Jobs that are over, bytes beyond the quota, stray references."""
    for job in service.queue.expired(now):
        over = expiry(job)
        if over is not None and over <= now:
            remove(service, job)
    _keep_within(service)
    _remove_strays(service, now)


def _keep_within(service: Service) -> None:
    most = service.cfg.quota.keep_gib * 2**30
    while most and service.store.used_bytes() > most:
        oldest = service.queue.oldest_finished(AT_ONCE)
        if not oldest:
            return  # what is left belongs to jobs that wait or run
        for job in oldest:
            remove(service, job)
            if service.store.used_bytes() <= most:
                return


def _remove_strays(service: Service, now: float) -> None:
    for entry in os.scandir(service.store.references):
        id = entry.name.split("-")[0]
        if ID.fullmatch(id) and now - entry.stat().st_mtime > STRAY_S and service.queue.get(id, None) is None:
            os.unlink(entry.path)


def remove_marked(service: Service, now: float) -> None:
    """Jobs that were deleted while they ran, and have ended."""
    for id in service.store.marked_removed():
        job = service.queue.get(id, None)
        if job is None:
            service.store.remove(id)
            service.store.unmark_removed(id)
        elif job.state in FINISHED:
            remove(service, job)
        elif not job.cancel_requested:  # it went back into the queue, or nobody came to ask
            service.queue.request_cancel(id, job.owner, now)
