"""Writes replies: the objects of the OpenAI interface, complete or as a stream of server events.

text            message.content is a text; in a stream, delta.content
with images     message.content is a list of parts: {"type": "text"} and {"type": "image_url"}
                with a data URL, in order; in a stream an image is delta.images, one such part
every reply     metadata: {"notice": "Research only, ...", "seed": of the random numbers}
"""

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from medmax_jax.generation.output_files import NOTICE
from medmax_jax.serving.api_requests import Asked
from medmax_jax.serving.data_urls import data_url, png_base64
from medmax_jax.serving.tickets import Event, Finished, ImageDone, TextDelta, TokenLogprob

DONE = "data: [DONE]\n\n"


@dataclasses.dataclass(kw_only=True, eq=False)
class Choice:
    """One of the answers so far."""

    parts: list[TextDelta | ImageDone]
    finished: Finished | None = None

    def add(self, event: Event) -> None:
        """Add what was generated next; consecutive text is one part."""
        if isinstance(event, Finished):
            self.finished = event
        elif isinstance(event, TextDelta) and self.parts and isinstance(self.parts[-1], TextDelta):
            self.parts[-1] = TextDelta(self.parts[-1].text + event.text)
        elif isinstance(event, TextDelta | ImageDone):
            self.parts.append(event)


class ReplyWriter:
    """The fields that all objects of one reply share."""

    def __init__(self, asked: Asked) -> None:
        """Create it; the reply has a new id."""
        request = asked.requests[0]
        self._asked, self._texts_only = asked, request.mode == "text"
        self._shared = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
            "metadata": {"notice": NOTICE, "seed": str(request.sample.seed)},
        }

    def completion(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the reply as one object; all choices are finished."""
        return self._shared | {
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {
                        "role": "assistant", "content": self._content(choice), "refusal": None,
                    },
                    "finish_reason": choice.finished.reason,
                    "logprobs": _logprobs(choice.finished.logprobs),
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage(choices),
        }  # fmt: skip

    def images(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the reply to an image generation; all choices are finished."""
        total = usage(choices)
        return {
            "created": self._shared["created"],
            "data": [{"b64_json": png_base64(choice.parts[0].image)} for choice in choices],
            "output_format": "png",
            "metadata": self._shared["metadata"],
            "usage": {
                "input_tokens": total["prompt_tokens"],
                "output_tokens": total["completion_tokens"],
                "total_tokens": total["total_tokens"],
            },
        }

    def first_chunk(self, index: int) -> str:
        """Return the server event that begins a choice."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, event: TextDelta | ImageDone | Finished) -> str:
        """Return the server event of an event."""
        if isinstance(event, TextDelta):
            return self._chunk(index, {"content": event.text})
        if isinstance(event, ImageDone):
            return self._chunk(index, {"images": [_image_part(event)]})
        return self._chunk(
            index, {}, finish_reason=event.reason, logprobs=_logprobs(event.logprobs)
        )

    def usage_chunk(self, choices: Sequence[Choice]) -> str:
        """Return the last server event, where the client asks for the usage."""
        return server_event(
            self._shared
            | {"object": "chat.completion.chunk", "choices": [], "usage": usage(choices)}
        )

    def _chunk(self, index: int, delta: dict[str, Any], **fields: Any) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None} | fields
        chunk = self._shared | {"object": "chat.completion.chunk", "choices": [choice]}
        return server_event(chunk | ({"usage": None} if self._asked.include_usage else {}))

    def _content(self, choice: Choice) -> str | list[dict[str, Any]]:
        if self._texts_only:
            return "".join(part.text for part in choice.parts)
        return [
            {"type": "text", "text": part.text} if isinstance(part, TextDelta)
            else _image_part(part)
            for part in choice.parts
        ]  # fmt: skip


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    """Return the tokens of a reply; the prompt is counted once."""
    finished = [choice.finished for choice in choices if choice.finished]
    prompt = max((f.prompt_tokens for f in finished), default=0)
    completion = sum(f.completion_tokens for f in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def server_event(body: dict[str, Any]) -> str:
    """Return an object as a server-sent event."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def _image_part(event: ImageDone) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(event.image)}}


def _logprobs(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {
        "content": [
            {
                "token": t.token, "logprob": t.logprob, "top_logprobs": [],
                # a token may be a part of a character, whose bytes its text does not show
                "bytes": None if "\ufffd" in t.token else list(t.token.encode()),
            }
            for t in tokens
        ],
        "refusal": None,
    }  # fmt: skip
