"""Reads the bodies of requests: the fields of the OpenAI interface, each checked.

    model, messages, modalities, stream, stream_options, n, seed, stop, max_tokens,
    max_completion_tokens, temperature, top_p, logprobs
    and as extra fields: repetition_penalty, image_temperature, image_top_p, guidance_scale_text,
    guidance_scale_image

A field that would change the answer and is not listed is an error, unless it has the value that
changes nothing: what a client asks for is done or refused.
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from medmax_jax.config import Sample
from medmax_jax.generation.requests import GenerateError, sample_names
from medmax_jax.generation.sampling_params import check_sample
from medmax_jax.io.errors import FileError, printable
from medmax_jax.io.text_files import TextFileError, parse_json
from medmax_jax.serving.api_errors import ApiError, field_error, of_exception
from medmax_jax.serving.data_urls import read_image
from medmax_jax.serving.prompts import Part, check_image_count
from medmax_jax.serving.service import Service
from medmax_jax.serving.tickets import GenerationRequest

MAX_CHOICES = 16  # n
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_MESSAGES = 1_000
MODES = {("text",): "text", ("image", "text"): "mixed", ("image",): "image"}
OPTIONS = {  # field -> field of config.Sample
    "top_p": "text_top_p",
    "repetition_penalty": "repetition_penalty",
    "image_temperature": "image_temperature",
    "image_top_p": "image_top_p",
    "guidance_scale_text": "guidance_scale_text",
    "guidance_scale_image": "guidance_scale_image",
}
IMAGE_OPTIONS = ("image_temperature", "image_top_p", "guidance_scale_text", "guidance_scale_image")
COMMON = ("model", "n", "seed", "user", "metadata", "store", "service_tier", "safety_identifier")
CHAT = {*COMMON, *OPTIONS, "messages", "modalities", "stream", "stream_options", "stop"}
CHAT |= {"max_tokens", "max_completion_tokens", "temperature", "logprobs", "top_logprobs"}
IMAGES = {*COMMON, *IMAGE_OPTIONS, "prompt", "size", "response_format"}
NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # values of other fields that change nothing
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
    "top_k": (0, -1), "min_p": (0,), "best_of": (1,), "num_beams": (1,), "length_penalty": (1,),
    "parallel_tool_calls": (True, False), "use_beam_search": (False,), "echo": (False,),
    "quality": ("auto", "standard"), "background": ("auto", "opaque"), "output_format": ("png",),
    "moderation": ("auto",), "style": ("natural",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a server sets for all requests."""

    sample: Sample  # the sampling options that a request does not set
    max_pixels: int  # of an image in a request


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A request that was read: the answers to generate, and how to return them."""

    requests: list[GenerationRequest]  # n choices
    stream: bool = False
    include_usage: bool = False


def read_chat(service: Service, data: bytes, options: ReadOptions) -> Asked:
    """Return what the body of a chat completion asks for; raise ApiError naming the field.

    It encodes the images, so it takes time: call it in a thread.
    """
    body = _body(data, CHAT)
    model = _model(service, body)
    mode = _mode(body)
    sample, stop = _sample(body, options.sample), _stop(body)
    stream = _flag(body, "stream")
    logprobs = _flag(body, "logprobs")
    if body.get("top_logprobs") not in (None, 0):
        field_error("top_logprobs", body["top_logprobs"], "0: only chosen tokens have logprobs")
    usage = body.get("stream_options") or {}
    if not isinstance(usage, dict) or usage and not stream:
        field_error("stream_options", usage, "an object, with stream true")
    count = _integer(body, "n", 1, MAX_CHOICES, 1)
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        field_error("messages", messages, f"a list of 1 to {MAX_MESSAGES} messages")
    _check_image_count(service, messages)
    turns = _turns(messages, options.max_pixels)
    requests = _requests(service, turns, "messages", count, model=model, sample=sample, mode=mode,
                         stop=stop, logprobs=logprobs)  # fmt: skip
    return Asked(requests=requests, stream=stream, include_usage=_flag(usage, "include_usage"))


def read_images(service: Service, data: bytes, options: ReadOptions) -> Asked:
    """Return what the body of an image generation asks for; raise ApiError naming the field."""
    body = _body(data, IMAGES)
    model, side = _model(service, body), service.bundle.vq_config.image_size
    if body.get("size") not in (None, "auto", f"{side}x{side}"):
        field_error("size", body["size"], f"{side}x{side} or auto: the model has one size")
    if body.get("response_format") not in (None, "b64_json"):
        field_error("response_format", body["response_format"], "b64_json: no file is stored")
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        field_error("prompt", prompt, "a text")
    count = _integer(body, "n", 1, MAX_CHOICES, 1)
    sample = _sample(body, options.sample)
    requests = _requests(service, [[prompt]], "prompt", count, model=model, sample=sample,
                         mode="image", stop=(), logprobs=False)  # fmt: skip
    return Asked(requests=requests)


def _requests(
    service: Service, turns: Sequence[Sequence[Part]], field: str, count: int, **settings: Any
) -> list[GenerationRequest]:
    try:
        prompt = service.prompt(turns)
    except (GenerateError, FileError, RuntimeError) as error:
        raise of_exception(error, field) from error
    names = sample_names([prompt] * count)
    return [GenerationRequest(prompt=prompt, name=name, **settings) for name in names]


def _check_image_count(service: Service, messages: Sequence[Any]) -> None:
    """Raise ApiError before any image is decoded where there are too many."""
    contents = [m.get("content") for m in messages if isinstance(m, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    count = sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)
    try:
        check_image_count(service.bundle, count)
    except GenerateError as error:
        raise of_exception(error, "messages") from error


def _body(data: bytes, known: set[str]) -> dict[str, Any]:
    try:
        body = parse_json(data, "the body")
    except TextFileError as error:
        raise ApiError(f"{error}; send a JSON object") from error
    if not isinstance(body, dict):
        raise ApiError("the body is not a JSON object; send the fields of the request")
    for field, value in body.items():
        if field in known or value is None:
            continue
        if field not in NEUTRAL:
            raise ApiError(
                f"{printable(field, 60)} is not a field of this server; remove it",
                printable(field, 60),
            )
        if value not in NEUTRAL[field]:
            allowed = " or ".join(repr(v) for v in NEUTRAL[field])
            field_error(field, value, f"{allowed}: this server has no other setting of it")
    return body


def _model(service: Service, body: Mapping[str, Any]) -> str:
    model, names = body.get("model"), service.names
    if not isinstance(model, str):
        field_error("model", model, f"one of {', '.join(names)}")
    if model not in names:
        raise ApiError(
            f"the model {printable(model, 80)!r} does not exist; use one of {', '.join(names)}",
            "model", status=404, code="model_not_found",
        )  # fmt: skip
    return model


def _mode(body: Mapping[str, Any]) -> str:
    kinds = body.get("modalities") or ["text"]
    names = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    mode = MODES.get(tuple(sorted(set(kinds)))) if names else None
    if not mode:
        field_error("modalities", kinds, '["text"], ["text", "image"] or ["image"]')
    return mode


def _sample(body: Mapping[str, Any], default: Sample) -> Sample:
    """Return the sampling options of a request."""
    changes: dict[str, Any] = {}
    for field, name in OPTIONS.items():
        if body.get(field) is not None:
            changes[name] = _number(body, field)
    if body.get("temperature") is not None:
        temperature = _number(body, "temperature")
        if temperature < 0:
            field_error("temperature", temperature, "at least 0, which is greedy")
        changes["text_greedy"] = temperature == 0
        changes |= {"text_temperature": temperature} if temperature else {}
    bounds = {f: body[f] for f in ("max_completion_tokens", "max_tokens") if body.get(f)}
    if len(set(bounds.values())) > 1:
        field_error("max_tokens", body["max_tokens"], "max_completion_tokens, or left out")
    for field in ("max_completion_tokens", "max_tokens"):
        if body.get(field) is not None:
            changes["max_gen_len"] = _integer(body, field, 1, 2**31 - 1, 1)
    changes["seed"] = _integer(body, "seed", 0, 2**32 - 1, secrets.randbelow(2**32))
    sample = dataclasses.replace(default, **changes)
    try:
        check_sample(sample)
    except GenerateError as error:
        message = str(error).replace("sample.text_greedy=True", "temperature=0")
        names = {"temperature": "text_temperature", "max_tokens": "max_gen_len", **OPTIONS}
        wrong = [field for field, name in names.items() if f"sample.{name}" in message]
        for field in wrong:
            message = message.replace(f"sample.{names[field]}", field)
        raise ApiError(message, next(iter(wrong), None)) from error
    return sample


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    valid = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not valid or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        field_error("stop", stops, f"up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _turns(messages: Sequence[Any], max_pixels: int) -> list[list[Part]]:
    """Return the parts of each turn; the text of a system message precedes the first turn's."""
    turns: list[list[Part]] = []
    before, system = "", []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            field_error(where, message, "an object")
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            field_error(f"{where}.role", role, "system, developer, user or assistant")
        parts = _parts(message.get("content"), f"{where}.content", max_pixels)
        if role in ("system", "developer"):
            if turns:
                field_error(f"{where}.role", role, "user or assistant: a system message is first")
            if not all(isinstance(part, str) for part in parts):
                field_error(f"{where}.content", "an image", "text in a system message")
            system += [f"{part}\n" for part in parts]
            continue
        if not turns and role != "user":
            field_error(f"{where}.role", role, "user in the first message")
        if role == before:
            turns[-1] += parts
        else:
            turns.append(parts)
        before = role
    if before != "user":
        field_error(f"messages[{len(messages) - 1}].role", before, "user in the last message")
    turns[0] = [*system, *turns[0]]
    return turns


def _parts(content: Any, where: str, max_pixels: int) -> list[Part]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list) or not content:
        field_error(where, content, "a text or a list of parts")
    parts: list[Part] = []
    for number, part in enumerate(content):
        of_part = f"{where}[{number}]"
        if not isinstance(part, dict):
            field_error(of_part, part, "an object")
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                field_error(f"{of_part}.text", part.get("text"), "a text")
            parts.append(part["text"])
        elif kind == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            parts.append(read_image(url, f"{of_part}.image_url", max_pixels=max_pixels))
        else:
            field_error(f"{of_part}.type", kind, "text or image_url")
    return parts


def _integer(body: Mapping[str, Any], field: str, low: int, high: int, default: int) -> int:
    value = body.get(field)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        field_error(field, value, f"an integer of {low} to {high}")
    return value


def _number(body: Mapping[str, Any], field: str) -> float:
    value = body[field]
    if type(value) not in (int, float):
        field_error(field, value, "a number")
    return float(value)


def _flag(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value not in (None, True, False):
        field_error(field, value, "true or false")
    return bool(value)
