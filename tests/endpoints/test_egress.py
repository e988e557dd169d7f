"""Which data may be sent to which host, and that no module bypasses the check."""

import ast
import pathlib

import pytest

from medmax_jax.endpoints import egress
from medmax_jax.endpoints.egress import CREDENTIALED, LICENCE_BOUND, OPEN, OutgoingError

ROOT = pathlib.Path(__file__).parents[2]
NETWORK = {"http", "urllib", "socket", "ssl", "requests", "httpx", "aiohttp", "openai", "wandb"}
LISTED = egress.parse_allowed_hosts(["llm.hospital.org:8443", "127.0.0.1:8000", "[::1]:8000"])


@pytest.mark.parametrize("data_class", [OPEN, LICENCE_BOUND])
@pytest.mark.parametrize("url", ["https://api.openai.com/v1", "http://10.0.0.5:8000/v1"])
def test_data_that_is_not_credentialed_may_be_sent_anywhere(data_class, url):
    assert egress.check(url, data_class, listed=frozenset()).path == "/v1"


@pytest.mark.parametrize(
    "url, name",
    [
        ("https://llm.hospital.org:8443/v1", "llm.hospital.org:8443"),
        ("https://LLM.Hospital.org.:8443/v1", "llm.hospital.org:8443"),
        ("http://127.0.0.1:8000/v1", "127.0.0.1:8000"),
        ("http://[::1]:8000/v1", "[::1]:8000"),
    ],
)
def test_credentialed_data_may_be_sent_to_listed_hosts(url, name):
    assert egress.check(url, CREDENTIALED, listed=LISTED).name == name


@pytest.mark.parametrize(
    "url, message",
    [
        ("https://llm.hospital.org/v1", "not be sent to llm.hospital.org:443, which is not listed"),
        (
            "https://llm.hospital.org.evil.com:8443/",
            "not be sent to llm.hospital.org.evil.com:8443",
        ),
        ("https://evil.com:8443/llm.hospital.org:8443", "not be sent to evil.com:8443"),
        ("https://xllm.hospital.org:8443/", "not be sent to xllm.hospital.org:8443"),
        ("http://127.0.0.1:8001/v1", "not be sent to 127.0.0.1:8001"),
        ("http://localhost:8000/v1", "not be sent to localhost:8000"),
        ("http://llm.hospital.org:8443/v1", "unencrypted over http; use https"),
    ],
)
def test_credentialed_data_is_sent_nowhere_else(url, message):
    with pytest.raises(OutgoingError, match="credentialed data may not be sent to") as caught:
        egress.check(url, CREDENTIALED, listed=LISTED)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://llm.hospital.org:8443@evil.com/v1",
        "https://user:secret@evil.com/v1",
        "https://evil.com\\@llm.hospital.org:8443/v1",
        "https://evil.com/v1\r\nHost: llm.hospital.org",
        "https://evil.com /v1",
        "https://evil.com/v1?to=x",
        "https://evil.com#@llm.hospital.org:8443",
        "https://еvil.com/v1",  # a Cyrillic letter
        "https://evil.com:99999/v1",
        "https://evil.com:0/v1",
        "https:///v1",
        "https://[::1/v1",
        "https://a,b/v1",
        "file:///etc/passwd",
        "evil.com",
        "",
    ],
)
def test_ambiguous_urls_are_rejected(url):
    with pytest.raises(OutgoingError) as caught:
        egress.check(url, OPEN, listed=LISTED)
    assert "secret" not in str(caught.value)


def test_unknown_data_class_is_rejected():
    with pytest.raises(OutgoingError, match="class 'secret' .* use one of open, licence-bound"):
        egress.check("https://a.org", "secret", listed=egress.parse_allowed_hosts(["a.org"]))


def test_allowed_hosts_have_three_forms():
    entries = ["a.org", "B.org:8000", "https://c.org/v1", "http://localhost:1/v1"]
    assert egress.parse_allowed_hosts(entries) == {
        "a.org:443",
        "b.org:8000",
        "c.org:443",
        "localhost:1",
    }


@pytest.mark.parametrize(
    "row, data_class",
    [
        ({"data_class": "open"}, OPEN),
        ({"data_class": "open", "credential": "no"}, OPEN),
        ({"credential": "NO"}, LICENCE_BOUND),
        ({"credential": "yes"}, CREDENTIALED),
        ({"credential": "YES", "data_class": "credentialed"}, CREDENTIALED),
    ],
)
def test_data_class_of_a_row(row, data_class):
    assert egress.data_class_of(row, "row 1") == data_class


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, "row 1: data_class is missing and credential is None; set data_class"),
        ({"credential": "unknown"}, "credential is 'unknown'"),
        ({"data_class": "public"}, "data_class is 'public'; use one of"),
        ({"data_class": "open", "credential": "Yes"}, "data_class is 'open' but credential is yes"),
        ({"data_class": "credentialed", "credential": "no"}, "'credentialed' but credential is no"),
        ({"credential": "the patient has"}, "credential is of type str; use yes or no"),
        ({"credential": True}, "credential is of type bool"),
        ({"data_class": ["x"], "credential": "yes"}, "data_class is of type list; use one of"),
        ({"data_class": "secret", "credential": "yes"}, "data_class is of type str"),
    ],
)
def test_data_class_is_never_guessed(row, message):
    with pytest.raises(OutgoingError) as caught:
        egress.data_class_of(row, "row 1")
    assert message in str(caught.value)


def test_derived_data_has_the_strictest_class():
    assert egress.strictest([OPEN, CREDENTIALED, LICENCE_BOUND]) == CREDENTIALED
    assert egress.strictest([]) == OPEN


def test_no_module_bypasses_the_egress_check():
    """Only the client, which calls the check, and its tests open connections."""
    importers = {}
    for folder in ("medmax_jax", "data", "eval", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            names = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module)
            names = {name.split(".")[0] for name in names - {"urllib.parse"}}  # opens nothing
            if names & NETWORK:
                importers[f"{folder}/{path.relative_to(ROOT / folder)}"] = names & NETWORK
    client = {"http", "socket", "ssl"}
    allowed = {
        "medmax_jax/endpoints/chat_api.py": client,
        "medmax_jax/serving/startup.py": {"socket"},  # of what listens, and sends nothing
        "medmax_jax/training/log_writer.py": {"wandb"},
        "medmax_jax/storage/gcs.py": {"requests"},  # names its errors; folders that the user names
    }
    assert importers == allowed, (
        "call models through endpoints/chat_api; ask endpoints/egress.check elsewhere"
    )
    tracking = (ROOT / "medmax_jax" / "training" / "log_writer.py").read_text()
    assert tracking.index("egress.check(") < tracking.index("import wandb")
