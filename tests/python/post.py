"""Posts bodies with httpx, all at once.

Standard input is one JSON object: url, http2 (bool), bodies (texts), and where the server speaks TLS: ca (a path), and
certificate and key (paths) for a client's own.
Every third body is sent from a generator, which is chunked with HTTP/1.1 and without a length with HTTP/2.
Standard output is one JSON array: for each body the status, the version of HTTP and the answer.
"""

import asyncio
import json
import ssl
import sys

import httpx

CHUNK_SIZE = 10_000

config = json.load(sys.stdin)


async def chunks(body: bytes):
    for begin in range(0, len(body), CHUNK_SIZE):
        yield body[begin : begin + CHUNK_SIZE]


async def post(client: httpx.AsyncClient, index: int, body: bytes) -> list:
    content = chunks(body) if index % 3 == 2 else body
    answer = await client.post(config["url"], content=content, headers={"Content-Type": "application/json"})
    return [answer.status_code, answer.http_version, answer.text]


async def main() -> list:
    verify = False
    if "ca" in config:
        verify = ssl.create_default_context(cafile=config["ca"])
        if "certificate" in config:
            verify.load_cert_chain(config["certificate"], config["key"])
    bodies = [body.encode() for body in config["bodies"]]
    client = httpx.AsyncClient(
        verify=verify,
        http1=not config["http2"],
        http2=config["http2"],
        trust_env=False,
        timeout=60,
        limits=httpx.Limits(max_connections=len(bodies)),
    )
    async with client:
        return await asyncio.gather(*(post(client, index, body) for index, body in enumerate(bodies)))


print(json.dumps(asyncio.run(main())))
