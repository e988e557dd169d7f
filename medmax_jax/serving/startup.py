"""Load the models and reserve the port of a program that answers requests: serve and demo."""

import os
import socket
from collections.abc import Mapping

from medmax_jax.generation.model_bundle import ModelBundle, load, with_adapter
from medmax_jax.generation.requests import GenerateError


def load_bundles(model: str | os.PathLike, names: Mapping[str, str]) -> dict[str, ModelBundle]:
    """Return the bundle of each name; names are mapped to their adapters, "" is the model itself.

    All bundles use the arrays of the model.

    Raises:
        GenerateError, ExportError, OSError: a folder is not a model, or not an adapter of it.
    """
    base = load(model)
    return {name: with_adapter(base, model, path) if path else base for name, path in names.items()}


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the port, 0 being a free one; it does not listen yet.

    Called before the model is loaded, so that a port in use is reported at once.

    Raises:
        GenerateError: the port is out of range, or the address cannot be used.
    """
    if not 0 <= port < 2**16:
        raise GenerateError(f"--port is {port}; it must be 0 to {2**16 - 1}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GenerateError(
            f"{host}, port {port}, cannot be used ({reason}); use another --port"
        ) from error
    return bound
