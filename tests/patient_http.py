"""httpx's calls with a limit that a busy machine keeps: its own is 5 s."""

from typing import Any

import httpx

from tests.patience import patience

LIMIT_S = 60.0


def request(method: str, url: str, **more: Any) -> httpx.Response:
    return httpx.request(method, url, **{"timeout": patience(LIMIT_S), **more})


def get(url: str, **more: Any) -> httpx.Response:
    return request("GET", url, **more)


def post(url: str, **more: Any) -> httpx.Response:
    return request("POST", url, **more)


def delete(url: str, **more: Any) -> httpx.Response:
    return request("DELETE", url, **more)
