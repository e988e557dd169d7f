"""One continuously batched engine for many clients, in one thread.

answer_events  Turns the tokens of one answer into events, up to a stop text.
metrics        Counts what the service does, as Prometheus metrics in a registry of its own.
prompts        From a conversation of text and images to the tokens of a prompt.
served_model   One served name in the engine thread: its engine, its requests, and how they end.
service        The engine service: one thread that answers requests to several models on one device.
tickets        Requests to the engine service, and the events that answer them.
"""

from medmax_jax.serving.service import Limits, Service
from medmax_jax.serving.tickets import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ImageDone,
    QueueFullError,
    ServiceClosedError,
    ServiceError,
    TextDelta,
    Ticket,
    TokenLogprob,
)

__all__ = [
    "Event",
    "Failed",
    "Finished",
    "GenerationRequest",
    "ImageDone",
    "Limits",
    "QueueFullError",
    "Service",
    "ServiceClosedError",
    "ServiceError",
    "TextDelta",
    "Ticket",
    "TokenLogprob",
]
