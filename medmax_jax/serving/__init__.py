"""One continuously batched engine for many clients, in one thread.

answer_events  Turns the tokens of one answer into events, up to a stop text.
api_errors     Errors in the form of the OpenAI interface: a status, and an object that names the
               field.
api_replies    Writes replies: the objects of the OpenAI interface, complete or as a stream of
               server events.
api_requests   Reads the bodies of requests: the fields of the OpenAI interface, each checked.
app            The HTTP interface: the routes of the OpenAI interface over one engine service.
data_urls      Images as data URLs, in requests and in replies.
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
