"""Weights & Biases: data is checked before it is sent; imported only when requested."""

import importlib.util

import micro_run
import pytest

from medmax_jax.training import log_writer


def init_wandb(credentials: dict, listed: list[str] = (), server: str = ""):
    environment = {"WANDB_BASE_URL": server} if server else {}
    return log_writer.init_wandb(
        "p", micro_run.run(), name="r", folder=".", credentials=credentials, listed=listed,
        environment=environment,
    )  # fmt: skip


def test_credentialed_metrics_are_sent_to_listed_hosts_only():
    with pytest.raises(
        log_writer.TrackingError, match="may not be sent to api.wandb.ai:443.*listed_host"
    ):
        init_wandb({"no": 3, "yes": 1})
    with pytest.raises(log_writer.TrackingError, match="api.wandb.ai"):
        init_wandb({"unknown": 1})
    with pytest.raises(log_writer.TrackingError, match="over http"):
        init_wandb({"yes": 1}, ["10.0.0.1:80"], "http://10.0.0.1")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("credentials, listed", [({"no": 1}, []), ({"yes": 1}, ["api.wandb.ai"])])
def test_missing_wandb_package_is_reported(credentials, listed):
    with pytest.raises(log_writer.TrackingError, match="wandb is not installed; pip install wandb"):
        init_wandb(credentials, listed)
