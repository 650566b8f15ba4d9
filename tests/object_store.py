"""An S3 server on loopback, which may be told to be too busy for every n-th request."""

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from influencespace.data.stores import filesystem
from influencespace.engine import attempts

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class S3Server:
    """A server in a thread of this process; `environment` leads clients to it."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.every = 0
        """Every so many requests one is refused; 0 refuses none."""
        self.refused = 0
        self._requests = 0
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "secret-testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self._requests += 1
        if not self.every or self._requests % self.every:
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        self.refused += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [SLOW_DOWN]

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()


def forget_between_tasks(machine: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every task of a local engine be done as if on a machine of its own: what lies here is gone when one begins.

    The tasks that were done so.
    """
    attempt, tasks = attempts.Worker.attempt, list[str]()

    def elsewhere(worker: attempts.Worker, task: Any, *shared: Any) -> attempts.TaskResult:
        shutil.rmtree(machine, ignore_errors=True)
        tasks.append(attempts.brief(task))
        return attempt(worker, task, *shared)

    monkeypatch.setattr(attempts.Worker, "attempt", elsewhere)
    return tasks


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server, to which this process and those that it starts are led until the block ends."""
    from s3fs import S3FileSystem

    def forget_clients() -> None:
        filesystem.cache_clear()
        S3FileSystem.clear_instance_cache()

    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        forget_clients()
        yield server
    forget_clients()
    server.stop()
