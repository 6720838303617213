"""An S3-compatible server of this machine (moto), for tests of runs on object storage."""

import contextlib
import urllib.request
from collections.abc import Iterator

import s3fs
from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def storage() -> Iterator[dict[str, str]]:
    """An empty storage; the environment variables by which s3:// leads there."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec would hand out one that talks to an earlier server
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()
