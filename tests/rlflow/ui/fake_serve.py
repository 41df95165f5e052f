"""What `rlflow serve` looks like from outside, without a model: it streams back what it was told, word by word."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from aiohttp import web


async def models(_request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "fake"}]})


async def complete(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    words = [f"{key}={asked[key]}" for key in ("model", "temperature") if key in asked]
    words += asked["messages"][-1]["content"].split()
    if "refuse" in words:
        return web.json_response({"error": {"message": "no such thing"}}, status=400)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for word in words:
        if word == "die":
            os._exit(7)
        if word == "wait":
            await asyncio.sleep(60)
        piece = {"choices": [{"delta": {"content": f"{word} "}, "finish_reason": None}]}
        await response.write(f"data: {json.dumps(piece)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


async def serve() -> None:
    print("loading", *sys.argv[1:], flush=True)
    if "broken" in sys.argv[1]:
        sys.exit("broken: config.json is no JSON")
    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", complete)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"serving fake at http://127.0.0.1:{runner.addresses[0][1]}/v1 (torch)", flush=True)
    await asyncio.Event().wait()


asyncio.run(serve())
