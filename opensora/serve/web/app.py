"""Routes of the web process. Home of FastAPI: what the calls do is in ``videos``, which knows nothing of it."""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from opensora.serve.jobs import Job, QueueFull, QueueUnavailable, SameKeyOtherRequest
from opensora.serve.refusal import Refused
from opensora.serve.web import metrics, videos
from opensora.serve.web.auth import Client
from opensora.serve.web.body import Body, Gone, Share, parse, read_body
from opensora.serve.web.cleanup import clean_forever
from opensora.serve.web.content import Sent, open_content
from opensora.serve.web.description import REMIX_BODY, SCHEMAS, answers, as_page, body
from opensora.serve.web.events import MOST_STREAMS, mark_of, stream
from opensora.serve.web.guard import Guard, answer_of, cors_headers, headers_of
from opensora.serve.web.service import Service
from opensora.serve.web.video_object import poll_ms

Variant = Literal["video", "thumbnail", "spritesheet"]
PAGE = {  # ending of a file of the page -> type
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "png": "image/png",
    "svg": "image/svg+xml",
}
_PART = re.compile(r"[a-z][a-z0-9_-]{0,40}\.[a-z]{2,4}")
_FORBIDDEN = (401, 403, 404)
_CREATES = (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503, 507)


def application(service: Service) -> Any:
    """The whole web process as one ASGI application."""
    return Guard(make_app(service), service)


def make_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        cleaning = asyncio.create_task(clean_forever(service))
        yield
        cleaning.cancel()
        with suppress(asyncio.CancelledError):
            await cleaning
        service.close()

    app = FastAPI(title="Videos from text", version="1", docs_url=None, redoc_url=None, lifespan=life)
    app.state.service = service
    if service.cfg.origins:
        app.add_middleware(CORSMiddleware, **cors_headers(service.cfg.origins))
    _add_refusals(app)
    _add_videos(app, service)
    _add_more(app, service)
    _add_state(app, service)
    _add_page(app)
    _describe(app, service)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _client(request: Request) -> Client:
    return _service(request).keys.client(headers_of(request.scope))


Who = Annotated[Client, Depends(_client)]
Idempotency = Annotated[str | None, Header(description="The same key and request give the same job")]


@asynccontextmanager
async def _read(request: Request) -> AsyncIterator[Body]:
    """What a request holds; its share of the memory for bodies is given back when it is answered."""
    service, headers = _service(request), headers_of(request.scope)
    share = Share(service.budget)
    try:
        data = await read_body(request.receive, headers, service.body_bytes, share)
        yield await service.work(lambda: parse(headers.get("content-type", ""), data))
    finally:
        share.give_back()


def _add_refusals(app: FastAPI) -> None:
    """Every error is an answer of one shape."""

    def told(kind: type[Exception] | int, refusal: Callable[[Any], Refused]) -> None:
        async def handle(request: Request, error: Exception) -> Response:
            headers, body = answer_of(refusal(error))
            return Response(body, refusal(error).status, headers)

        app.add_exception_handler(kind, handle)

    told(Refused, lambda error: error)
    told(Gone, lambda error: Refused(400, "the connection was closed", code="gone"))
    told(QueueFull, _of_full_queue)
    told(
        SameKeyOtherRequest, lambda error: Refused(409, str(error) or "this Idempotency-Key came with another request")
    )
    told(QueueUnavailable, lambda error: Refused(503, "the queue does not answer", headers={"Retry-After": "5"}))
    told(RequestValidationError, _of_parameters)
    told(404, lambda error: Refused(404, "there is nothing here; see /docs", code="not_found"))
    told(405, lambda error: Refused(405, "not by this method; see /docs", headers=error.headers))


def _of_full_queue(error: QueueFull) -> Refused:
    retry = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return Refused(429, str(error), code="queue_full", headers=retry)


def _of_parameters(error: RequestValidationError) -> Refused:
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return Refused(400, f"{name}: {first['msg']}", param=name, code="invalid_value")


def _add_videos(app: FastAPI, service: Service) -> None:
    async def shown(make: Callable[[], Job], *, long: bool = False) -> JSONResponse:
        def told() -> tuple[Job, dict[str, Any]]:
            job = make()
            return job, videos.show(service, job)

        job, answer = await (service.work_long(told) if long else service.work(told))
        return JSONResponse(answer, headers={"openai-poll-after-ms": str(poll_ms(job, answer["x"]["eta_s"]))})

    @app.post("/v1/videos", responses=answers("Video", "The job", *_CREATES), openapi_extra=body())
    async def create_video(request: Request, who: Who, idempotency_key: Idempotency = None) -> Response:
        async with _read(request) as asked:
            long = bool(asked.files) or "input_reference" in asked.fields
            return await shown(lambda: videos.create(service, who, asked, idempotency_key), long=long)

    @app.post(
        "/v1/videos/forecast",
        responses=answers("Forecast", "What a request would take", 400, 401, 403, 404, 408, 413, 415, 422, 503),
        openapi_extra=body(needs_prompt=False),
    )
    async def forecast_video(request: Request, who: Who) -> Response:
        async with _read(request) as asked:
            return JSONResponse(await service.work(lambda: videos.forecast(service, who, asked)))

    @app.get("/v1/videos", responses=answers("VideoPage", "Jobs by time", 400, *_FORBIDDEN))
    async def list_videos(
        who: Who,
        limit: Annotated[int, Query(ge=0, le=100)] = 20,
        after: Annotated[str | None, Query(description="Id of the last one of the page before")] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        return JSONResponse(await service.work(lambda: videos.page(service, who, limit, after, order)))

    @app.get("/v1/videos/{video_id}", responses=answers("Video", "The job", *_FORBIDDEN))
    async def retrieve_video(video_id: str, who: Who) -> Response:
        return await shown(lambda: videos.find(service, who, video_id))

    @app.delete("/v1/videos/{video_id}", responses=answers("Deleted", "It is gone", *_FORBIDDEN))
    async def delete_video(video_id: str, who: Who) -> Response:
        return JSONResponse(await service.work(lambda: videos.delete(service, who, video_id)))

    @app.post("/v1/videos/{video_id}/cancel", responses=answers("Video", "The job", *_FORBIDDEN, 409))
    async def cancel_video(video_id: str, who: Who) -> Response:
        return await shown(lambda: videos.cancel(service, who, video_id))

    @app.post(
        "/v1/videos/{video_id}/remix", responses=answers("Video", "The new job", *_CREATES), openapi_extra=REMIX_BODY
    )
    async def remix_video(request: Request, video_id: str, who: Who, idempotency_key: Idempotency = None) -> Response:
        async with _read(request) as asked:
            return await shown(lambda: videos.remix(service, who, video_id, asked, idempotency_key))


def _add_more(app: FastAPI, service: Service) -> None:
    bytes_of = {"type": "string", "format": "binary"}

    @app.get(
        "/v1/videos/{video_id}/content",
        responses=answers(
            None,
            "The file, or a range of it",
            400,
            *_FORBIDDEN,
            409,
            416,
            media=dict.fromkeys(videos.MEDIA_TYPES.values(), bytes_of),
        ),
    )
    async def video_content(request: Request, video_id: str, who: Who, variant: Variant = "video") -> Response:
        asked = headers_of(request.scope)

        def opened() -> Sent:
            return open_content(*videos.content(service, who, video_id, variant), asked)

        return _sent(service, await service.work(opened))

    @app.get(
        "/v1/videos/{video_id}/events",
        responses=answers(
            None, "Server-sent events", *_FORBIDDEN, 503, media={"text/event-stream": {"type": "string"}}
        ),
    )
    async def video_events(video_id: str, who: Who, last_event_id: Annotated[str, Header()] = "") -> Response:
        told = await service.work(lambda: videos.show(service, videos.find(service, who, video_id)))
        if service.streams >= MOST_STREAMS:
            raise Refused(503, "too many streams at once; ask for the video", code="busy", headers={"Retry-After": "5"})
        if told["status"] in ("completed", "failed") and mark_of(told) == last_event_id:
            return Response(status_code=204)  # all is said: a browser does not come back
        events = stream(service, who, video_id, last_event_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    for path in ("edits", "extensions", "characters"):
        _add_not_done(app, path)


def _add_not_done(app: FastAPI, name: str) -> None:
    @app.post(f"/v1/videos/{name}", responses={501: answers(None, "", 501)[501]}, name=name)
    async def not_done(who: Who) -> Response:
        raise Refused(
            501, f"/v1/videos/{name}: not done by this service; POST /v1/videos makes new ones", code="not_done"
        )


def _sent(service: Service, sent: Sent) -> Response:
    if sent.status == 304:
        return Response(status_code=304, headers=dict(sent.headers))

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while piece := await service.work_long(sent.next):
                yield piece
        finally:
            sent.file.close()

    return StreamingResponse(pieces(), sent.status, dict(sent.headers))


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=answers("ModelPage", "Models, and what they can do", 401))
    async def list_models(who: Who) -> Response:
        return JSONResponse({"object": "list", "data": await service.work(lambda: videos.models(service))})

    @app.get("/v1/models/{model}", responses=answers("Model", "One of them", 401, 404))
    async def retrieve_model(model: str, who: Who) -> Response:
        for told in await service.work(lambda: videos.models(service)):
            if told["id"] == model:
                return JSONResponse(told)
        raise Refused(404, "no such model", param="model", code="model_not_found")

    @app.get("/healthz", responses=answers("Alive", "This process answers"))
    async def alive() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", responses=answers("Ready", "A worker is ready to sample", 503))
    async def ready() -> Response:
        names = sorted(await service.work(service.ready_models))
        if not names or service.stopping:
            raise Refused(503, "no worker is ready", code="not_ready", headers={"Retry-After": "5"})
        return JSONResponse({"status": "ready", "models": names})

    @app.get("/metrics", responses=answers(None, "For Prometheus", 401, media={"text/plain": {"type": "string"}}))
    async def figures(who: Who) -> Response:
        def text() -> str:
            disk = {"free": service.store.free_bytes(), "used": service.store.used_bytes()}
            counts, workers = service.queue.counts(), service.workers()
            return metrics.text(service.requests, counts, service.cfg.models, workers, disk)

        return PlainTextResponse(await service.work(text), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    folder = files("opensora.serve.web") / "page"

    def part(name: str) -> Response:
        media_type = PAGE.get(name.rpartition(".")[2])
        if media_type is None or not _PART.fullmatch(name) or not (folder / name).is_file():
            raise Refused(404, "the page has no such part", code="not_found")
        return Response((folder / name).read_bytes(), media_type=media_type, headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return part("page.html")

    @app.get("/page/{name}", include_in_schema=False)
    def page_part(name: str) -> Response:
        return part(name)

    @app.get("/favicon.ico", include_in_schema=False)
    def favicon() -> Response:
        return part("favicon.png")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(as_page(app.openapi()))


def _describe(app: FastAPI, service: Service) -> None:
    """The description that FastAPI makes of the routes, with the schemas that these name."""
    description = app.openapi()
    components = {"schemas": json.loads(json.dumps(SCHEMAS))}
    if service.keys.needed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
    description["components"] = components
