"""A real S3 server on this machine, moto's, with objects in it, whose answers a test may replace."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

REGION = "eu-central-1"
SECRETS = {"AWS_ACCESS_KEY_ID": "AKIATESTING", "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-sees"}
ENVIRONMENT = {
    **SECRETS,
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass
class Server:
    faults: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """Statuses and codes with which the next requests of a path are answered; 0 breaks the connection."""
    always: dict[str, tuple[int, str]] = field(default_factory=dict)
    """The same for all requests of a path."""
    stops_at: str = ""
    """A request for this path ends the server for good."""
    requests: list[str] = field(default_factory=list)
    """`GET /bucket/key` of each."""
    url: str = ""
    client: Any = None
    """boto3's, to put objects into buckets."""
    stop: Callable[[], None] = lambda: None

    def fill(self, bucket: str, objects: dict[str, bytes]) -> None:
        """Makes a bucket of these objects."""
        self.client.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
        for key, data in objects.items():
            self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def fill_from(self, bucket: str, folder: Path) -> None:
        """Makes a bucket of a folder's files."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.fill(bucket, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def over(self, app: Wsgi) -> Wsgi:
        """The application with this server's faults."""

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            self.requests.append(f"{environ['REQUEST_METHOD']} {path}")
            if path == self.stops_at:
                Thread(target=self.stop).start()
            status, code = self.faults[path].pop(0) if self.faults.get(path) else self.always.get(path, (200, ""))
            if status == 200:
                return app(environ, start)
            if status == 0:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start(f"{status} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{code} {path}</Message></Error>".encode()]

        return answer


def forget() -> None:
    """Removes all buckets: moto keeps what the servers of this process had."""
    from moto.backends import get_backend

    get_backend("s3").reset()


@contextmanager
def serving() -> Iterator[Server]:
    """Runs a server until the block ends, or until it is stopped."""
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = Server()
    app = server.over(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def stop() -> None:
        http.shutdown()
        with suppress(OSError):
            http.server_close()

    server.url, server.stop = f"http://127.0.0.1:{http.server_port}", stop
    secrets = {name.lower(): value for name, value in SECRETS.items()}
    server.client = boto3.client("s3", endpoint_url=server.url, region_name=REGION, **secrets)
    thread.start()
    try:
        yield server
    finally:
        stop()
        thread.join()
