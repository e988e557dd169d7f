"""Weights & Biases: asked of the guard first, imported only when asked."""

import importlib.util

import micro_run
import pytest

from medmax_jax.training import log_writer


def ask(credentials: dict, listed: list[str] = (), server: str = ""):
    environment = {"WANDB_BASE_URL": server} if server else {}
    return log_writer.init_wandb(
        "p", micro_run.run(), name="r", folder=".", credentials=credentials, listed=listed,
        environment=environment,
    )  # fmt: skip


def test_credentialed_numbers_go_to_listed_hosts_only():
    with pytest.raises(
        log_writer.TrackingError, match="may not go to api.wandb.ai:443.*listed_host"
    ):
        ask({"no": 3, "yes": 1})
    with pytest.raises(log_writer.TrackingError, match="api.wandb.ai"):
        ask({"unknown": 1})
    with pytest.raises(log_writer.TrackingError, match="over http"):
        ask({"yes": 1}, ["10.0.0.1:80"], "http://10.0.0.1")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("credentials, listed", [({"no": 1}, []), ({"yes": 1}, ["api.wandb.ai"])])
def test_a_missing_package_is_said(credentials, listed):
    with pytest.raises(log_writer.TrackingError, match="wandb is not installed; pip install wandb"):
        ask(credentials, listed)
