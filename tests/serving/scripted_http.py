"""A fake HTTP process: forwards messages between one TCP client and rank 0, and misbehaves on demand.

Each line that the client sends is a message for rank 0 as JSON, and each message of rank 0 comes back as a line. The
variable `SCRIPTED_HTTP` names a misbehavior.
"""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from stagdist.serving.protocol import pack, receive
from stagdist.serving.settings import ServerSettings

MISBEHAVIOR = os.environ.get("SCRIPTED_HTTP", "")


def forward(client: socket.socket, rank_0: socket.socket) -> None:
    """Client to rank 0."""
    for line in client.makefile("rb"):
        rank_0.sendall(pack(json.loads(line)))


def serve(settings: ServerSettings, listener: socket.socket, rank_0: socket.socket) -> None:
    """Until rank 0 is gone or asks for the end."""
    rank_0.sendall(pack({"kind": "welcome", "settings": settings.fingerprint()}))
    if MISBEHAVIOR == "deaf":
        time.sleep(600)
    client: socket.socket | None = None
    listener.setblocking(False)
    stream, held = rank_0.makefile("rb"), b""
    while (message := receive(stream)) is not None and message["kind"] != "exit":
        held += json.dumps(message).encode() + b"\n"
        try:
            client, _ = listener.accept()
            client.setblocking(True)
            threading.Thread(target=forward, args=(client, rank_0), daemon=True).start()
        except BlockingIOError:
            pass
        if client is not None:
            client.sendall(held)
            held = b""
    if message is not None:
        rank_0.shutdown(socket.SHUT_RDWR)
        if MISBEHAVIOR == "lingers":
            time.sleep(0.6)
        os._exit(0)


def main() -> None:
    """Read the settings, listen, serve one rank 0 after the other."""
    settings = ServerSettings.model_validate_json(sys.stdin.read())
    if MISBEHAVIOR == "refuse":
        print("the port is in use")
        sys.exit(2)
    listener = socket.create_server((settings.host, settings.port))
    path = Path(settings.engine_socket)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        while True:
            rank_0, _ = unix.accept()
            if MISBEHAVIOR == "silent":
                time.sleep(600)
            serve(settings, listener, rank_0)
            if not settings.supervised:
                break


if __name__ == "__main__":
    main()
