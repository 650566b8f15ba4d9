"""Running both towers over a stream of batches: on a GPU copies run beside kernels, and results are fetched one batch late.

On the CPU the same code runs without streams. What a GPU does here was written without one at hand: the CPU's path is tested.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]


class Towers(Protocol):
    """What is asked of `models.encoders.DualEncoder`."""

    def encode_image(self, pixels: Any) -> Tensor: ...
    def encode_text(self, tokens: Any) -> Tensor: ...


class EncodePass:
    """Batches in, embeddings out, in the same order; a batch that does not fit a GPU's memory is halved, and so are all after it.

    `limit` is the largest number of rows that has been found to fit, None where all did. `tf32` allows matrix products of less
    precision; convolutions stay exact.
    """

    def __init__(self, encoder: Towers, device: torch.device | str = "cpu", *, tf32: bool = False) -> None:
        self.encoder = encoder
        self.device = torch.device(device)
        self.tf32 = tf32
        self.limit: int | None = None
        # simulated machines have GPUs of which torch knows nothing
        self._cuda = self.device.type == "cuda" and torch.cuda.is_available()
        self._copies = torch.cuda.Stream(self.device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._busy = 0.0
        self._passes: list[tuple[Any, Any]] = []  # of a GPU, when each began and ended

    def images(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Floats]:
        """Embeddings (n, D) of each batch of pixels (n, 3, H, W)."""
        return self._run(({"pixels": torch.from_numpy(batch)} for batch in batches), self._image)

    def texts(self, batches: Iterable[Mapping[str, npt.NDArray[Any]]]) -> Iterator[Floats]:
        """Embeddings (n, D) of each batch of the text tower's inputs, each (n, L)."""
        tensors = ({name: torch.from_numpy(ids) for name, ids in batch.items()} for batch in batches)
        return self._run(tensors, self.encoder.encode_text)

    def take_busy(self) -> float:
        """Seconds for which the device has computed since this was asked last; its results are waited for."""
        for began, ended in self._passes:
            ended.synchronize()
            self._busy += began.elapsed_time(ended) / 1e3
        busy, self._busy, self._passes = self._busy, 0.0, []
        return busy

    def _image(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.encoder.encode_image(inputs["pixels"])

    def _run(
        self, batches: Iterable[dict[str, Tensor]], encode: Callable[[dict[str, Tensor]], Tensor]
    ) -> Iterator[Floats]:
        queued: deque[Callable[[], Floats]] = deque()
        for batch in batches:
            with matmul_precision(self.tf32):
                queued.append(self._fetch_later(self._encoded(batch, encode)))
            if len(queued) > 1:  # the next batch is on its way before this one is waited for
                yield queued.popleft()()
        while queued:
            yield queued.popleft()()

    def _encoded(self, batch: dict[str, Tensor], encode: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Embeddings of a batch on the device, in parts of at most `limit` rows."""
        rows, done, start = len(next(iter(batch.values()))), [], 0
        while start < rows:
            size = min(self.limit or rows, rows - start)
            try:
                part = {name: values[start : start + size] for name, values in batch.items()}
                part = self._on_device(part)
                with self._counted():
                    done.append(encode(part))
                start += size
                continue
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
            # outside of the handler, whose traceback holds on to what the failed pass has allocated
            self.limit = size // 2
            if self._cuda:
                torch.cuda.empty_cache()
        return done[0] if len(done) == 1 else torch.cat(done)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the time that the device computes in the block."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._busy += time.perf_counter() - start
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record(torch.cuda.current_stream(self.device))
        yield
        ended.record(torch.cuda.current_stream(self.device))
        self._passes.append((began, ended))

    def _on_device(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._copies is None:
            return part
        with torch.cuda.stream(self._copies):
            # torch keeps pinned buffers and gives one again when the copies from it are done
            moved = {name: ids.pin_memory().to(self.device, non_blocking=True) for name, ids in part.items()}
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        for values in moved.values():
            values.record_stream(current)
        return moved

    def _fetch_later(self, embeddings: Tensor) -> Callable[[], Floats]:
        if self._copies is None:
            result: Floats = embeddings.float().numpy()
            return lambda: result
        host = torch.empty(embeddings.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(embeddings, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self.device))

        def fetch() -> Floats:
            copied.synchronize()
            return np.array(host)  # the buffer itself is used again

        return fetch


@contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """Matrix products in TF32 or in full float32, where a GPU has both; set back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
