"""A real S3 server on this machine, moto's, and objects in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIATESTING",
    "AWS_SECRET_ACCESS_KEY": "very-secret-key",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
"""Credentials that the server takes, and no others."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Server:
    url: str
    client: Any
    """boto3's, to put objects into buckets."""

    def fill(self, bucket: str, objects: dict[str, bytes]) -> None:
        """Makes a bucket of these objects."""
        where = {"LocationConstraint": ENVIRONMENT["AWS_DEFAULT_REGION"]}
        self.client.create_bucket(Bucket=bucket, CreateBucketConfiguration=where)
        for key, data in objects.items():
            self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def fill_from(self, bucket: str, folder: Path) -> None:
        """Makes a bucket of a folder's files."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.fill(bucket, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


@contextmanager
def serving() -> Iterator[Server]:
    """Runs a server until the block ends."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    secrets = {name.lower(): value for name, value in ENVIRONMENT.items() if name.endswith(("_ID", "_KEY"))}
    region = ENVIRONMENT["AWS_DEFAULT_REGION"]
    try:
        yield Server(url, boto3.client("s3", endpoint_url=url, region_name=region, **secrets))
    finally:
        server.stop()
