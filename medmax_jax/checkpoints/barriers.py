"""Synchronize the hosts of a run through the coordinator; a run of one host never waits."""

import contextlib
from collections.abc import Iterator

import jax

PEER_TIMEOUT = 600.0  # seconds that hosts wait for each other's files of a step
SHARE_TIMEOUT = 7 * 86_400.0  # of hosts that divide work among them; a host that died ends it


def barrier(name: str, timeout: float = PEER_TIMEOUT) -> None:
    """Synchronize all hosts through the coordinator; each name is used once.

    It is used after a compilation, whose duration differs: Gloo gives the peers of the first
    collective only 30 s.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # programs of one host start without Orbax

    processes = set(range(jax.process_count()))
    multihost.sync_global_processes(name, processes=processes, timeout=int(timeout))


@contextlib.contextmanager
def first_host_first(name: str) -> Iterator[None]:
    """Run the block on the first host, and afterwards on the others; each name is used once."""
    if jax.process_index():
        barrier(name, SHARE_TIMEOUT)
    yield
    if not jax.process_index():
        barrier(name, SHARE_TIMEOUT)
