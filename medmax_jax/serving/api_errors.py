"""Errors in the form of the OpenAI interface: a status, and an object that names the field.

400  {"error": {"message": "n is 0; it must be an integer of 1 to 16",
                "type": "invalid_request_error", "param": "n", "code": null}}
"""

from typing import Any, NoReturn

from starlette.responses import JSONResponse

from medmax_jax.generation.requests import GenerateError
from medmax_jax.io.errors import FileError, printable
from medmax_jax.serving import tickets
from medmax_jax.serving.tickets import Failed, QueueFullError, ServiceError

INVALID = "invalid_request_error"
_OF_FAILURE = {  # kind of a failed answer -> status, type
    tickets.TIME: (504, "timeout"),
    tickets.ENGINE: (500, "server_error"),
    tickets.CLOSED: (503, "service_unavailable"),
    tickets.CANCELLED: (499, "cancelled"),
}


class ApiError(Exception):
    """An error that a client receives as an error object."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = INVALID,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Store the parts. `param`: the field of the request; `kind`: the type of the error."""
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {
            "error": {
                "message": printable(message, 1_000), "type": kind, "param": param, "code": code,
            }
        }  # fmt: skip

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse(self.body, self.status, self.headers)


def field_error(param: str, value: Any, expected: str) -> NoReturn:
    """Raise the error of a field whose value is not one that is expected."""
    raise ApiError(f"{param} is {printable(repr(value), 60)}; it must be {expected}", param)


def of_failure(failed: Failed) -> ApiError:
    """Return the error of an answer that failed."""
    status, kind = _OF_FAILURE[failed.kind]
    return ApiError(failed.message, status=status, kind=kind)


def of_exception(error: Exception, param: str | None) -> ApiError:
    """Return the error of a request that the service did not accept; `param`: the likely field."""
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(error.retry_after_s)}
        return ApiError(
            str(error), status=429, kind="rate_limit_error", code="queue_full", headers=headers
        )
    if isinstance(error, ServiceError):
        return ApiError(
            str(error), status=503, kind="service_unavailable", headers={"Retry-After": "30"}
        )
    if isinstance(error, GenerateError | FileError):
        code = "context_length_exceeded" if "context" in str(error) else None
        return ApiError(str(error), param, code=code)
    raise error
