"""The gateway in front of PostgREST, as hosted projects have it: /rest/v1, apikey, error shapes.

Run as a process: `python -m syncer.testkit.gateway --port N --rest URL --keys FILE`. It strips the
prefix, asks for the `apikey` header, uses it as the bearer when there is none, and answers as the
hosted gateway does when PostgREST is gone. Bodies up to 20 MB pass whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

BODY_BYTES_MAX = 20 * 1024 * 1024  # above any batch, below what would hurt a laptop
UPSTREAM_TIMEOUT_S = 60.0  # the hosted gateway's cap
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "te"}
METHODS = ["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"]


def create_gateway(rest_url: str, keys: frozenset[str]) -> FastAPI:
    """Return the gateway application for one PostgREST and the project's API keys."""
    app = FastAPI(openapi_url=None)
    client = httpx.AsyncClient(
        base_url=rest_url,
        timeout=UPSTREAM_TIMEOUT_S,
        limits=httpx.Limits(max_connections=64, max_keepalive_connections=32),
    )

    @app.get("/auth/v1/health")
    async def health() -> dict[str, str]:
        return {"name": "local"}

    @app.api_route("/rest/v1/{path:path}", methods=METHODS)
    async def rest(path: str, request: Request) -> Response:
        apikey = request.headers.get("apikey")
        if apikey is None:
            return _refuse("No API key found in request")
        if apikey not in keys:
            return _refuse("Invalid API key")
        body = await request.body()
        if len(body) > BODY_BYTES_MAX:
            return JSONResponse({"message": "Request size limit exceeded"}, status_code=413)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        headers.setdefault("authorization", f"Bearer {apikey}")
        try:
            reply = await client.request(
                request.method,
                f"/{path}",
                params=request.query_params,
                headers=headers,
                content=body,
            )
        except httpx.ConnectError:
            return JSONResponse({"message": "name resolution failed"}, status_code=503)
        except httpx.HTTPError:
            message = "An invalid response was received from the upstream server"
            return JSONResponse({"message": message}, status_code=502)
        passed = {k: v for k, v in reply.headers.items() if k.lower() not in _HOP_BY_HOP}
        passed.pop("content-encoding", None)  # httpx has decoded it
        return Response(reply.content, reply.status_code, passed)

    return app


def _refuse(message: str) -> Response:
    return JSONResponse({"message": message}, status_code=401)


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rest", required=True)
    parser.add_argument("--keys", type=Path, required=True)
    options = parser.parse_args()
    keys = frozenset(json.loads(options.keys.read_text()))
    uvicorn.run(
        create_gateway(options.rest, keys),
        host="127.0.0.1",
        port=options.port,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
