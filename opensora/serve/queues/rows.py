"""A job as a row of the table, and back. What cannot be a row of ours is not taken for one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from acceleration.files.sealed_json import ANY, COUNT, NULL, NUMBER, TEXT, WHOLE, Each, Kind, Shape, mismatch
from opensora.serve.jobs import STATES, Job, JobError, NewJob
from opensora.serve.queues.statements import COLUMNS

_ASKED = [field.name for field in fields(NewJob)]
_OBJECT = Each(ANY)
_BIT = Kind("0 or 1", lambda value: value in (0, 1))
_STATE = Kind("a state", lambda value: value in STATES)
_SPEC: Shape = {
    **dict.fromkeys(("id", "owner", "model", "prompt", "batch_key", "digest"), TEXT),
    **dict.fromkeys(("steps", "priority"), WHOLE),
    **dict.fromkeys(("remixed_from", "idempotency"), (TEXT, NULL)),
    "request": _OBJECT,
    "references": Each(TEXT, list),
    "expires_at": (NUMBER, NULL),
}
_ROW: Shape = {
    **dict.fromkeys(("id", "owner", "model", "batch_key", "spec"), TEXT),
    **dict.fromkeys(("progress", "step", "batch", "attempt", "tries"), COUNT),
    **dict.fromkeys(("started_at", "completed_at", "expires_at", "lease_until"), (NUMBER, NULL)),
    **dict.fromkeys(("idempotency", "worker", "error", "result"), (TEXT, NULL)),
    **{"priority": WHOLE, "state": _STATE, "created_at": NUMBER, "cancel_requested": _BIT},
}
_ERROR: Shape = {"code": TEXT, "message": TEXT}


class Damaged(Exception):
    """A row that this program cannot have written."""


def digest(text: str | None) -> str | None:
    """What stands for a text of any kind in a column: databases refuse some characters."""
    return None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def plain(value: Mapping[str, Any]) -> str:
    """JSON in ASCII, which any database takes."""
    return json.dumps(dict(value), separators=(",", ":"))


def values_of(job: NewJob) -> dict[str, Any]:
    """What is asked, by the names of the columns."""
    return {
        **{name: getattr(job, name) for name in ("id", "owner", "model", "priority", "expires_at")},
        "batch_key": digest(job.batch_key),
        "idempotency": digest(job.idempotency),
        "spec": plain({name: getattr(job, name) for name in _ASKED} | {"request": dict(job.request)}),
    }


def error_text(error: JobError | None) -> str | None:
    return None if error is None else plain(asdict(error))


def job_of(row: Sequence[Any]) -> Job:
    """
    Raises:
        Damaged: see there.
    """
    found = dict(zip(COLUMNS, row, strict=True))
    _check(found, _ROW)
    spec = _object(found["spec"], _SPEC)
    asked = {**spec, "references": tuple(spec["references"])}
    if any(found[name] != value for name, value in values_of(NewJob(**asked)).items() if name != "spec"):
        raise Damaged("columns that contradict one another")
    stands = {field.name: found[field.name] for field in fields(Job) if field.name in found and field.name not in spec}
    return Job(
        **asked,
        **stands
        | {
            "cancel_requested": bool(found["cancel_requested"]),
            "error": None if found["error"] is None else JobError(**_object(found["error"], _ERROR)),
            "result": {} if found["result"] is None else _object(found["result"], _OBJECT),
        },
    )


def _object(text: str, shape: Shape) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        raise Damaged("text that should be JSON") from None
    _check(value, shape)
    return value


def _check(value: Any, shape: Shape) -> None:
    wrong = mismatch(value, shape)
    if wrong:
        raise Damaged(wrong)
