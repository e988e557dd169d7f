"""Counts what the service does, as Prometheus metrics in a registry of its own.

medmax_requests_running, medmax_requests_waiting                             now, by model
medmax_cache_slots_used, medmax_cache_usage_ratio                            now, by model
medmax_requests_total{model, outcome}       finished requests: stop, length or a failure's kind
medmax_prompt_tokens_total, medmax_generated_tokens_total, medmax_images_total       by model
medmax_first_token_seconds, medmax_request_seconds                       histograms by model
"""

import dataclasses

import prometheus_client

PREFIX = "medmax"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclasses.dataclass(frozen=True, eq=False)
class Metrics:
    """The metrics of one service."""

    registry: prometheus_client.CollectorRegistry
    running: prometheus_client.Gauge
    waiting: prometheus_client.Gauge
    slots_used: prometheus_client.Gauge
    cache_usage: prometheus_client.Gauge
    requests: prometheus_client.Counter
    refused: prometheus_client.Counter
    prompt_tokens: prometheus_client.Counter
    generated_tokens: prometheus_client.Counter
    images: prometheus_client.Counter
    first_token: prometheus_client.Histogram
    duration: prometheus_client.Histogram

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return prometheus_client.generate_latest(self.registry)


def make_metrics() -> Metrics:
    """Return metrics that are all zero."""
    registry = prometheus_client.CollectorRegistry()

    def gauge(name: str, text: str) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(f"{PREFIX}_{name}", text, ["model"], registry=registry)

    def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"{PREFIX}_{name}", text, labels, registry=registry)

    def histogram(name: str, text: str) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            f"{PREFIX}_{name}", text, ["model"], registry=registry, buckets=SECONDS
        )

    return Metrics(
        registry=registry,
        running=gauge("requests_running", "Requests that occupy a row."),
        waiting=gauge("requests_waiting", "Requests in the queue."),
        slots_used=gauge("cache_slots_used", "KV-cache slots of running requests."),
        cache_usage=gauge("cache_usage_ratio", "Part of the KV cache that running requests fill."),
        requests=counter("requests", "Requests that ended, by outcome.", "model", "outcome"),
        refused=counter("requests_refused", "Requests that were not accepted.", "reason"),
        prompt_tokens=counter("prompt_tokens", "Tokens of prompts.", "model"),
        generated_tokens=counter("generated_tokens", "Generated tokens, with codes.", "model"),
        images=counter("images", "Generated images.", "model"),
        first_token=histogram("first_token_seconds", "Seconds from submission to first output."),
        duration=histogram("request_seconds", "Seconds from submission to the end."),
    )
