"""A small real server that gives a project's public keys, and signs with the private ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)


class KeyServer:
    """Answers every request with `status` and `body`; `hold` keeps it from answering."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.private: dict[str, Any] = {}
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body: bytes | None = None
        self.asked = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def add(self, key_id: str, kind: str = "EC", **members: Any) -> Any:
        """Make a key and publish it; returns the private key."""
        private: Any = _RSA if kind == "RSA" else ec.generate_private_key(ec.SECP256R1())
        self.private[key_id] = (private, members)
        return private

    def key_set(self) -> bytes:
        """Return the document of the public keys."""
        keys = []
        for key_id, (private, members) in self.private.items():
            algorithm = "ES256" if isinstance(private, ec.EllipticCurvePrivateKey) else "RS256"
            made = jwt.get_algorithm_by_name(algorithm).to_jwk(private.public_key(), as_dict=True)
            known = {"kid": key_id, "alg": algorithm, "use": "sig", "key_ops": ["verify"]}
            keys.append({**made, **known, **members})
        return json.dumps({"keys": keys}).encode()

    def token(self, key_id: str, user: str = "alice", **claims: Any) -> str:
        """Sign a token as Supabase does."""
        private, _ = self.private[key_id]
        algorithm = "ES256" if isinstance(private, ec.EllipticCurvePrivateKey) else "RS256"
        return jwt.encode(
            payload(user, **claims), private, algorithm=algorithm, headers={"kid": key_id}
        )

    def public_pem(self, key_id: str) -> bytes:
        """Return a public key as everybody can have it."""
        public = self.private[key_id][0].public_key()
        return bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def payload(user: str = "alice", **claims: Any) -> dict[str, Any]:
    """Return the claims of a good token; None leaves one out."""
    exp = datetime.now(UTC) + timedelta(hours=1)  # noqa: TID251  tokens know only real time
    whole = {"sub": user, "aud": "authenticated", "role": "authenticated", "exp": exp, **claims}
    return {name: value for name, value in whole.items() if value is not None}


@contextmanager
def key_server() -> Iterator[KeyServer]:
    """Serve on a free port of this machine inside the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as Supabase keeps them

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def do_GET(self) -> None:
            made.asked += 1
            made.go_on.wait(20)
            body = made.key_set() if made.body is None else made.body
            self.send_response(made.status)
            for name, value in {"Content-Type": "application/json", **made.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # who asked has gone, which some tests mean

    server = Server(("127.0.0.1", 0), Handler)
    made = KeyServer(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
