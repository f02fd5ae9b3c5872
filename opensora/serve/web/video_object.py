"""A job as clients see it: the video object of the /v1/videos shape, and what we tell besides, under ``x``."""

from collections.abc import Mapping
from typing import Any

from opensora.serve.jobs import FINISHED, Job
from opensora.serve.model_info import ModelInfo

LEAST_POLL_S, MOST_POLL_S = 0.25, 5.0
_STATUS = {"completed": "completed", "failed": "failed", "cancelled": "failed"}
_CANCELLED = {"code": "cancelled", "message": "cancelled, as was asked"}


def status(job: Job) -> str:
    """One of four words; clients stop at any other one. A job is in progress from its first step on."""
    if job.state == "running" and job.started_at is not None:
        return "in_progress"
    return _STATUS.get(job.state, "queued")


def video_object(job: Job, info: ModelInfo | None, position: int | None, now: float) -> dict[str, Any]:
    """
    Args:
        info: of its model; None: no longer served.
        position: how many jobs come before it; None: it does not wait.
    """
    sampling = job.request["sampling"]
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": status(job),
        "progress": 100 if job.state == "completed" else min(job.progress, 99),
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": expiry(job),
        "prompt": job.prompt,
        "size": f"{sampling['width']}x{sampling['height']}",
        "seconds": number(job.request["seconds"]),
        "remixed_from_video_id": job.remixed_from,
        "error": _error(job),
        "x": {
            "queue_position": position,
            "eta_s": eta_s(job, info, position, now),
            "step": job.step,
            "steps": job.steps,
            "batch": job.batch,
            "attempt": job.attempt,
            "seconds_used": job.result.get("seconds_used"),
            "seed": sampling["seed"],
            "num_frames": sampling["num_frames"],
            "fps": round(sampling["num_frames"] / job.request["seconds"], 6),
            "references": len(job.references),
            "request": _again(job),
        },
    }


def _error(job: Job) -> dict[str, str] | None:
    if job.state == "cancelled":
        return dict(_CANCELLED)
    if job.state != "failed":
        return None
    if job.error is None:
        return {"code": "sampling_failed", "message": "it failed"}
    return {"code": job.error.code, "message": job.error.message}


def _again(job: Job) -> dict[str, Any]:
    """Fields that ask for the same clip, with the same prompt, model and references."""
    request: Mapping[str, Any] = job.request
    told = {**request["sampling"], "negative_prompt": request["neg"], "cond_type": request["cond_type"]}
    return {**told, **({"lora": request["lora"]} if request.get("lora") else {})}


def expiry(job: Job) -> int | None:
    """When it and its files are removed: so long after its end as was set from its beginning on."""
    if job.expires_at is None:
        return None
    return int(job.expires_at + max(0.0, (job.completed_at or job.created_at) - job.created_at))


def eta_s(job: Job, info: ModelInfo | None, position: int | None, now: float) -> float | None:
    """Seconds until it is there, about: by its own pace once that is known, else by the forecast, taking jobs before it
    for ones like it."""
    if job.state in FINISHED:
        return None
    sampling = job.request["sampling"]
    costs = None if info is None else info.cost(sampling["width"], sampling["height"], sampling["num_frames"])
    rest = 0.0 if costs is None else costs[2]
    if job.state == "running" and job.started_at is not None and job.step > 0:
        return round((now - job.started_at) / job.step * (job.steps - job.step) + rest, 1)
    if costs is None:
        return None
    return round((costs[1] * job.steps + rest) * (1 + (position or 0)), 1)


def poll_ms(job: Job, eta: float | None) -> int:
    """When to ask again: about ten times until it is there."""
    wait = MOST_POLL_S if eta is None else eta / 10
    return int(1000 * min(MOST_POLL_S, max(LEAST_POLL_S, wait)))


def number(value: float) -> str:
    """A number as people write it: 2, 5.375."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
