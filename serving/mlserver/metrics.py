"""What Prometheus is told of a served family."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import REGISTRY

from tocom.serving.service.request import Answer
from tocom.serving.service.service import Service

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServiceMetrics:
    """The metrics of one service."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Registers them.

        Args:
            registry: Where; of each name there can be one.
        """
        self._requests = Counter(
            "tocom_requests", "Answered requests, by the degree that answered.", ["degree"], registry=registry
        )
        self._refused = Counter(
            "tocom_refused", "Requests that were not answered: bad input, a full queue, a failed engine.",
            ["reason"], registry=registry,
        )  # fmt: skip
        self._images = Counter("tocom_images", "Images, by the degree that answered.", ["degree"], registry=registry)
        self._latency = Histogram(
            "tocom_request_seconds", "From when a request was accepted to its answer.", ["degree"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._batches = Histogram("tocom_batch_images", "Images in a batch.", buckets=_IMAGES, registry=registry)
        self._engine = Histogram(
            "tocom_batch_seconds", "What the engine took for a batch.", ["degree"], buckets=_SECONDS, registry=registry
        )
        self._degree = Gauge("tocom_degree", "Degree in force for requests that leave it to the load.",
                             registry=registry)  # fmt: skip
        self._queued = Gauge("tocom_queued_images", "Images that wait.", registry=registry)
        self._restarts = Gauge("tocom_worker_restarts", "Engine processes that were started again.", registry=registry)

    def watch(self, service: Service) -> None:
        """Reads the state of a service whenever the metrics are asked for."""
        self._degree.set_function(lambda: service.degree)
        self._queued.set_function(lambda: service.queued)
        self._restarts.set_function(lambda: service.restarts)

    def batch(self, degree: int, images: int, seconds: float) -> None:
        """Counts a batch that an engine finished."""
        self._batches.observe(images)
        self._engine.labels(degree).observe(seconds)

    def ended(self, result: Answer | BaseException) -> None:
        """Counts a valid request: its answer, or why there is none."""
        if isinstance(result, BaseException):
            self.refused(type(result).__name__)
            return
        self._requests.labels(result.degree).inc()
        self._images.labels(result.degree).inc(len(result.logits))
        self._latency.labels(result.degree).observe((result.queue_ms + result.engine_ms) / 1e3)

    def refused(self, reason: str) -> None:
        """Counts a request without an answer.

        Args:
            reason: "bad input", or the name of the error.
        """
        self._refused.labels(reason).inc()
