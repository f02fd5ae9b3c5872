"""What the calls of /v1/videos do, once it is known who asks: everything here waits for the queue and the disk, and
runs in a thread.
"""

import errno
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora.serve.form_fields import from_form
from opensora.serve.jobs import FINISHED, Job, Order
from opensora.serve.model_info import ModelInfo
from opensora.serve.refusal import Refused
from opensora.serve.request import Asked, Kind, check_room, new_id, new_job, read
from opensora.serve.web import pictures
from opensora.serve.web.auth import Client
from opensora.serve.web.body import Body
from opensora.serve.web.service import Service
from opensora.serve.web.video_object import number, status, video_object

ID = re.compile(r"video_[0-9a-f]{32}")
MOST_IDEMPOTENCY = 255  # characters of the header
VARIANTS: Mapping[str, tuple[str, ...]] = {  # -> kinds of files in the store
    "video": ("mp4", "png"),
    "thumbnail": ("webp",),
    "spritesheet": ("jpg",),
}
MEDIA_TYPES = {"mp4": "video/mp4", "png": "image/png", "webp": "image/webp", "jpg": "image/jpeg"}


@dataclass(frozen=True)
class Reference:
    """A file of a request: its bytes, or the name of one that the store has."""

    kind: Kind
    data: bytes = b""
    name: str = ""


def show(service: Service, job: Job, models: Mapping[str, ModelInfo] | None = None) -> dict[str, Any]:
    """The video object of a job as it stands."""
    known = service.models() if models is None else models
    position = service.queue.position(job) if job.state == "queued" else None
    return video_object(job, known.get(job.model), position, time.time())


def create(service: Service, client: Client, body: Body, idempotency: str | None) -> Job:
    """The job of a request; it is on the disk when this returns.

    Raises:
        Refused: see ``read``; 507 where the disk is nearly full.
        QueueFull, SameKeyOtherRequest: of the queue.
    """
    fields, references = _parts(body)
    if idempotency is not None and not (0 < len(idempotency) <= MOST_IDEMPOTENCY and idempotency.isprintable()):
        raise Refused(
            400, f"Idempotency-Key: must be 1 to {MOST_IDEMPOTENCY} printable characters", code="invalid_value"
        )
    return _add(service, client, fields, references, idempotency=idempotency, digest=body.digest())


def remix(service: Service, client: Client, id: str, body: Body, idempotency: str | None) -> Job:
    """A job like another one, with another prompt; same seed, size, seconds and references."""
    source = find(service, client, id)
    fields = dict(body.fields) or from_form(body.pairs)
    if body.files or set(fields) != {"prompt"}:
        other = next((name for name in fields if name != "prompt"), "prompt")
        raise Refused(
            400, f"{other[:80]}: must be the prompt, and nothing else", param=other[:80], code="unknown_field"
        )
    request = source.request
    again = {**request["sampling"], "neg": request["neg"], "cond_type": request["cond_type"], "lora": request["lora"]}
    references = [Reference("clip" if name.endswith(".mp4") else "image", name=name) for name in source.references]
    return _add(
        service,
        client,
        {**again, "model": source.model, **fields},
        references,
        idempotency=idempotency,
        digest=f"remix {id} {body.digest()}",
        remixed_from=id,
    )


def _parts(body: Body) -> tuple[dict[str, Any], list[Reference]]:
    """(fields, files) of a request, of JSON or a form."""
    fields = dict(body.fields) or from_form(body.pairs)
    files = pictures.of_json(fields.pop(pictures.FIELD, None))
    for name, data in body.files:
        if name.removesuffix("[]") != pictures.FIELD:
            message = f"{name[:80]}: unknown field of a file; must be {pictures.FIELD}"
            raise Refused(400, message, param=name[:80], code="unknown_field")
        files.append(data)
    return fields, [Reference(pictures.kind_of(data), data) for data in files]


def _add(
    service: Service,
    client: Client,
    fields: Mapping[str, Any],
    references: Sequence[Reference],
    *,
    idempotency: str | None,
    digest: str,
    remixed_from: str | None = None,
) -> Job:
    asked, info = _asked(service, client, fields, references)
    check_room(asked, info)
    _check_disk(service)
    id, now, quota = new_id(), time.time(), service.cfg.quota
    names: list[str] = []
    try:
        with _disk_errors():
            for index, one in enumerate(references):
                kept = service.pictures.copy(one.name, id, index) if one.name else ""
                names.append(kept or service.pictures.keep(id, index, one.data))
        wanted = new_job(
            asked,
            info,
            id=id,
            owner=client.owner,
            references=tuple(names),
            expires_at=now + 3600 * quota.keep_hours if quota.keep_hours else None,
            remixed_from=remixed_from,
            idempotency=idempotency,
            digest=digest,
        )
        job = service.queue.add(wanted, now, most=quota.queued, most_of_owner=quota.queued_per_key)
    except BaseException:
        service.store.remove(id, tuple(names))
        raise
    if job.id != id:  # there before, by its idempotency key
        service.store.remove(id, tuple(names))
    return job


def _asked(
    service: Service, client: Client, fields: Mapping[str, Any], references: Sequence[Reference], *, whole: bool = True
) -> tuple[Asked, ModelInfo]:
    models = service.models()
    if not models:
        message = "no model has been loaded yet; try again when /readyz says so"
        raise Refused(503, message, code="not_ready", headers={"Retry-After": "10"})
    kinds = [one.kind for one in references]
    asked = read(fields, kinds, models, service.default, needs_prompt=whole, most_priority=client.most_priority)
    return asked, models[asked.model]


def _check_disk(service: Service) -> None:
    least = service.cfg.quota.free_gib * 2**30
    if service.store.free_bytes() < least:
        raise Refused(507, "the disk of this service is nearly full; delete videos", code="disk_full")


class _disk_errors:
    """A full disk is 507; another error of it is as it is."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Refused(507, "the disk of this service is full; delete videos", code="disk_full") from error


def forecast(service: Service, client: Client, body: Body) -> dict[str, Any]:
    """What a request would cost; it may lack a prompt, and files of its kind."""
    fields, references = _parts(body)
    if not references and "cond_type" in fields:
        fields.pop("cond_type")
    asked, info = _asked(service, client, fields, references, whole=False)
    option = asked.option
    width, height = option.width or 0, option.height or 0
    peak, step_s, other_s = info.cost(width, height, option.num_frames)
    waiting = sum(count for (_, state), count in service.queue.counts().items() if state == "queued")
    return {
        "object": "video.forecast",
        "model": asked.model,
        "size": f"{width}x{height}",
        "num_frames": option.num_frames,
        "fps": option.fps,
        "seconds": number(asked.seconds),
        "steps": option.num_steps,
        "takes_s": round(step_s * option.num_steps + other_s, 2),
        "step_s": round(step_s, 4),
        "peak_gib": round(peak / 2**30, 3),
        "room_gib": round(info.room_bytes / 2**30, 3),
        "fits": not info.room_bytes or peak <= info.room_bytes,
        "waiting": waiting,
    }


def find(service: Service, client: Client, id: str) -> Job:
    """
    Raises:
        Refused: 404; there is none, or it is another's.
    """
    job = service.job(id, client.owner) if ID.fullmatch(id) else None
    if job is None:
        raise _not_found(id, "video_id")
    return job


def _not_found(id: str, param: str) -> Refused:
    shown = id if ID.fullmatch(id) else "this"
    return Refused(404, f"no video is called {shown}", param=param, code="not_found")


def page(service: Service, client: Client, limit: int, after: str | None, order: Order) -> dict[str, Any]:
    """A page of the list. Jobs that are being removed are passed over, so that only the last page is short."""
    models = service.models()
    shown: list[dict[str, Any]] = []
    more = True
    while more and len(shown) < limit:
        try:
            found, more = service.queue.page(client.owner, limit=limit - len(shown), after=after, order=order)
        except KeyError:
            raise _not_found(after or "", "after") from None
        shown += [show(service, job, models) for job in found if not service.store.is_marked_removed(job.id)]
        after = found[-1].id if found else after
        more = more and bool(found)
    ends = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return {"object": "list", "data": shown, "first_id": ends[0], "last_id": ends[1], "has_more": more and limit > 0}


def cancel(service: Service, client: Client, id: str) -> Job:
    """The job: cancelled if it waited, else asked to stop at its next step."""
    job = service.queue.request_cancel(find(service, client, id).id, client.owner, time.time())
    if job is None:
        raise _not_found(id, "video_id")
    if job.state in ("completed", "failed"):
        raise Refused(409, f"it is {job.state} already; delete it instead", param="video_id", code="already_finished")
    return job


def delete(service: Service, client: Client, id: str) -> dict[str, Any]:
    """Forget a job and its files. One that runs is asked to stop; it is out of sight at once, and its files go when it
    has ended."""
    job: Job | None = find(service, client, id)
    service.store.mark_removed(id)  # first: whatever happens next, it is cleaned up
    if job is not None and job.state not in FINISHED:
        job = service.queue.request_cancel(id, client.owner, time.time())
    if job is not None and job.state in FINISHED:
        remove(service, job)
    return {"id": id, "object": "video.deleted", "deleted": True}


def remove(service: Service, job: Job) -> None:
    """A finished job: its files first, so that no crash between leaves files that nobody knows of."""
    service.store.remove(job.id, job.references)
    service.queue.remove(job.id, None)
    service.store.unmark_removed(job.id)


def content(service: Service, client: Client, id: str, variant: str) -> tuple[Path, str]:
    """(a whole file, its media type) of a completed job.

    Raises:
        Refused: 409 until it is completed; 404 where there is no such file.
    """
    job = find(service, client, id)
    if job.state != "completed":
        told = f"this video is {status(job)}" + (": nothing was made" if job.state in FINISHED else "; ask again later")
        raise Refused(409, told, param="video_id", code="not_completed")
    paths = ((kind, service.store.video(id, kind)) for kind in VARIANTS[variant])
    for kind, path in paths:
        if path.is_file():
            return path, MEDIA_TYPES[kind]
    raise Refused(404, f"this video has no {variant}", param="variant", code="not_found")


def models(service: Service) -> list[dict[str, Any]]:
    """Models, and what the page needs to know of each."""
    ready = service.ready_models()
    return [_model(info, info.name in ready) for info in service.models().values()]


def _model(info: ModelInfo, ready: bool) -> dict[str, Any]:
    told = replace(info, costs=()).plain()
    told["sizes"] = [f"{width}x{height}" for width, height in info.sizes]
    told["seconds"] = [number(frames / info.defaults["fps"]) for frames in info.frames]
    told["ready"] = ready
    for name in ("name", "created", "costs"):
        told.pop(name)
    return {"id": info.name, "object": "model", "created": info.created, "owned_by": "opensora", "x": told}
