"""The explorer in a browser on this machine: a server that only this machine reaches, by a secret address.

The address has a secret in it, so that no other page or user of this machine can ask; the Host header has to
name this machine, so that no other site's name can be led here (DNS rebinding); what is sent is bounded.
"""
import hmac
import io
import secrets
import socket
import threading
import webbrowser
from typing import Any

from ..data.folder import decoded
from ..errors import InputError, expect, install, one_line_of_warnings
from . import page
from .look import WHERE, Explorer, encoded

MACHINE = "127.0.0.1"
HOSTS = [MACHINE, "localhost"]
QUESTION, PICTURE = 1 << 16, 1 << 24  # bytes that are read of a question, and of a picture's file
PIXELS = 50_000_000  # of a picture's file
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # none for which pillow starts a program


def app(explorer: Explorer, secret: str) -> Any:
    """The server as an ASGI application: /SECRET/ is the page, /SECRET/ask and /SECRET/picture answer it."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route
    text = page.html(form="native")
    headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
               "X-Content-Type-Options": "nosniff", "Content-Security-Policy": page.policy(text)}

    def known(request: Request) -> bool:
        return hmac.compare_digest(request.path_params["secret"].encode(), secret.encode())

    async def show(request: Request) -> Response:
        if not known(request):
            return PlainTextResponse("no such page: use the whole address that was printed\n", 404)
        return Response(text, media_type="text/html", headers=headers)

    def answering(most: int, function: Any) -> Any:
        async def endpoint(request: Request) -> Response:
            if not known(request):
                return PlainTextResponse("no such page\n", 404)
            data = b""
            async for part in request.stream():
                data += part
                if len(data) > most:
                    return PlainTextResponse(f"{WHERE}: more than {most:,} bytes", 413)
            try:
                reply = await run_in_threadpool(function, data)
            except (InputError, MemoryError) as error:
                return PlainTextResponse(str(error) or "out of memory", 400)
            return Response(reply, media_type="application/json", headers=headers)
        return endpoint

    ask = answering(QUESTION, lambda data: explorer.answer(data.decode("utf-8", "replace")))
    picture = answering(PICTURE, lambda data: picture_of(data, explorer.size))
    return Starlette(routes=[Route("/{secret}/", show), Route("/{secret}/ask", ask, methods=["POST"]),
                             Route("/{secret}/picture", picture, methods=["POST"])],
                     middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)])


def picture_of(data: bytes, size: int) -> str:
    """A picture's file -> JSON: {"pixels"} of the models' size, as `Explorer.look` takes them. InputError for
    what pillow cannot read, or is not let read."""
    with one_line_of_warnings(WHERE, "pillow"):
        image = decoded(io.BytesIO(data), (size, size), WHERE, "the file", FORMATS, PIXELS)
    return f'{{"pixels":"{encoded(image)}"}}'


def listen(port: int) -> socket.socket:
    """A socket of this machine alone. port: 0 for any that is free."""
    expect(0 <= port < 1 << 16, WHERE, f"port {port}, expected 0 to {(1 << 16) - 1}")
    try:
        return socket.create_server((MACHINE, port))
    except OSError as error:
        raise InputError(f"{WHERE}: port {port}: {error.strerror}; give another --port, or none") from error


def serve(port: int = 0, browser: bool = True) -> None:
    """Answer until Ctrl-C, which raises KeyboardInterrupt. Prints the address; opens it in a `browser`."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise InputError(f"{WHERE} needs starlette and uvicorn ({error}): "
                         f"{install('starlette', 'uvicorn', 'pillow')}") from None
    with listen(port) as place:
        secret = secrets.token_urlsafe(16)
        address = f"http://{MACHINE}:{place.getsockname()[1]}/{secret}/"
        explorer = Explorer()
        explorer.look(scene=0)  # the first pass takes longer than all others
        config = uvicorn.Config(app(explorer, secret), log_config=None, access_log=False, lifespan="off",
                                ws="none", http="h11", timeout_graceful_shutdown=1)
        print(f"{address}\n(for this machine only; Ctrl-C ends it)", flush=True)
        if browser:  # in a thread of its own: a browser of the terminal does not return
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        uvicorn.Server(config).run(sockets=[place])
