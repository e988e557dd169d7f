"""Endpoints and judges through eval.run: bounds of tokens, empty answers, names, servers down."""

import json
import subprocess
import time

import pytest
from llm_server import completion, free_url, serving, short_waits  # noqa: F401
from ml_collections import ConfigDict
from test_eval_models import program, run, says_yes, write_items

from medmax_jax import cli
from medmax_jax.configs import eval_tiny
from medmax_jax.endpoints.chat_api import EndpointError, TransientError
from medmax_jax.endpoints.egress import OutgoingError
from medmax_jax.eval import evaluate
from medmax_jax.io import journal

COUNT = 4


def judge(url: str, model: str = "j") -> ConfigDict:
    """Return the settings of a judge at a URL."""
    config = eval_tiny.get_config().unlock().judge
    config.update(endpoint=f"{model}@{url}", repeats=1)
    config.service.retries = 0
    return config


def verdict(request: dict, n: int) -> bytes:
    """Reply that every answer is correct."""
    case = json.loads(request["messages"][1]["content"])["case"]
    return completion(json.dumps({"case": case, "correct": True}))


# Answers.


def test_an_empty_answer_is_unparsed_and_not_an_endpoint_error(tmp_path):
    items = write_items(tmp_path / "data", COUNT)

    def behave(request, n):
        return completion("" if "number 1" in json.dumps(request) else "yes")

    with serving(behave) as llm:
        first = run(items, tmp_path / "out", f"endpoint:m@{llm.url}")
        again = run(items, tmp_path / "out", f"endpoint:m@{llm.url}")
        assert len(llm.requests) == COUNT
    row = first["scores"][0]
    assert (row["n"], row["n_unparsed"], row["n_unscored"], row["n_errors"]) == (COUNT, 1, 0, 0)
    assert row["value"] == pytest.approx(1 / 4) and again["scores"] == first["scores"]
    assert first["errors"] == 0


def test_a_reasoning_model_gets_the_bound_of_the_user(tmp_path, capsys):
    items = write_items(tmp_path / "data", COUNT)

    def reasoner(request, n):
        """Write 200 tokens before the answer."""
        enough = request.get("max_tokens", 0) >= 200
        return completion("yes" if enough else "", finish="stop" if enough else "length")

    with serving(reasoner) as llm:
        model = f"endpoint:m@{llm.url}"
        with pytest.raises(cli.Interrupted, match="finish_reason length; max_tokens 16 was sent"):
            run(items, tmp_path / "short", model)
        capsys.readouterr()
        own = '{"temperature": 0, "max_tokens": 2048}'
        prices = dict(price_in=1.0, price_out=1.0)
        row = run(items, tmp_path / "out", model, parameters=own, **prices)["scores"][0]
        output = capsys.readouterr().out
    assert (row["n_unscored"], row["value"]) == (0, pytest.approx(1 / 2))
    assert [r["max_tokens"] for r in llm.requests[-COUNT:]] == [2048] * COUNT
    assert "max_tokens 2048 of config.service.parameters is sent in place of each family" in output
    assert f"at most {COUNT * 2048} out" in output


@pytest.mark.parametrize(
    "parameters, sent",
    [
        ({"max_completion_tokens": 512}, {"max_completion_tokens": 512}),
        ({"max_completion_tokens": 8}, {"max_completion_tokens": 8}),
        ({"max_tokens": None}, {}),
        ({"max_completion_tokens": None}, {}),
        ({"temperature": 1}, {"temperature": 1, "max_tokens": 16}),
    ],
)
def test_the_bound_has_the_name_and_value_that_the_user_chose(tmp_path, capsys, parameters, sent):
    items = write_items(tmp_path / "data", 2)
    with serving(says_yes) as llm:
        summary = run(
            items, tmp_path / "out", f"endpoint:m@{llm.url}", parameters=json.dumps(parameters)
        )
    assert summary["scores"][0]["n_unscored"] == 0
    for request in llm.requests:
        assert {k: v for k, v in request.items() if k not in ("model", "messages")} == sent
    no_bound = "sets no bound of tokens (null), so none is sent" in capsys.readouterr().out
    assert no_bound == (None in parameters.values())


@pytest.mark.parametrize("name", ["m@20250929", "@cf/acme/vision"])
def test_a_name_with_at_signs(tmp_path, name):
    items = write_items(tmp_path / "data", 2)
    with serving(says_yes) as llm:
        run(items, tmp_path / "out", f"endpoint:{name}@{llm.url}")
    assert {request["model"] for request in llm.requests} == {name}


# Servers that are down.


@pytest.mark.parametrize(
    "url, why", [(None, "refused"), ("http://no-such-host.invalid:80/v1", "cannot be reached")]
)
def test_an_unreachable_endpoint_is_reported_before_the_plan(tmp_path, capsys, url, why):
    items, start = write_items(tmp_path / "data", 2), time.monotonic()
    with pytest.raises(TransientError, match=f"{why}.*; start the server, or correct the URL"):
        run(items, tmp_path / "out", f"endpoint:m@{url or free_url()}")
    assert time.monotonic() - start < 4  # 2 s, and reading the items on a busy machine
    assert "plan" not in capsys.readouterr().out and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("url", [None, "http://no-such-host.invalid:80/v1"])
def test_an_unreachable_judge_is_reported_before_the_first_request(tmp_path, capsys, url):
    items = write_items(tmp_path / "data", 2, question_type="open")
    url = url or free_url()
    with serving(says_yes) as llm:
        with pytest.raises(TransientError, match="j at .* cannot be reached"):
            run(items, tmp_path / "out", f"endpoint:m@{llm.url}", judge=judge(url))
        assert llm.connections == 0 and "plan" not in capsys.readouterr().out
        with pytest.raises(
            TransientError, match="j at .* cannot be reached"
        ):  # before it is converted
            run(items, tmp_path / "out", f"hf:{tmp_path}", judge=judge(url))

    class Asked:
        def generate(self, requests):
            raise AssertionError("asked before the judge was looked for")

    with pytest.raises(TransientError, match="j at .* cannot be reached"):
        own = dict(judge=dict(endpoint=f"j@{url}"), progress=print)
        evaluate(Asked(), items, tmp_path / "own", "strict", **own)


def test_a_complete_workdir_requires_no_server(tmp_path):
    items = write_items(tmp_path / "data", 2, question_type="open")
    with serving(says_yes) as llm, serving(verdict) as other:
        given = dict(model=f"endpoint:m@{llm.url}", judge=judge(other.url))
        first = run(items, tmp_path / "out", **given)
        assert len(llm.requests) == len(other.requests) == 2
    assert first["judge"]["unscored"] == {"correct": 0}
    assert run(items, tmp_path / "out", **given)["scores"] == first["scores"]
    (tmp_path / "out" / "records.jsonl").unlink()  # the replies are in the cache
    (tmp_path / "out" / "judgments.jsonl").unlink()
    with pytest.raises(TransientError, match="j at "):  # what it will be shown is not known yet
        run(items, tmp_path / "out", **given)
    del given["judge"]
    assert run(items, tmp_path / "out", **given)["errors"] == 0


def test_a_judge_without_permission_is_reported_before_the_first_request(tmp_path):
    items = write_items(tmp_path / "data", 2, question_type="open", data_class="credentialed")
    with serving(verdict) as other:
        with pytest.raises(OutgoingError, match="credentialed data may not be sent to"):
            run(items, tmp_path / "out", "baseline:constant", judge=judge(other.url))
        assert other.connections == 0


def test_a_missing_key_is_reported_before_the_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_KEY_HERE", raising=False)
    items = write_items(tmp_path / "data", 2)
    with serving(says_yes) as llm:
        with pytest.raises(EndpointError, match="variable NO_KEY_HERE has no usable key"):
            run(items, tmp_path / "out", f"endpoint:m@{llm.url}", key_env="NO_KEY_HERE")
    assert llm.connections == 0 and "plan" not in capsys.readouterr().out


def test_an_item_whose_prompt_is_the_path_of_an_image_is_named(tmp_path):
    items = write_items(tmp_path / "data", 2, prompt="0.png")
    with pytest.raises(ValueError, match="item q0: field 'prompt' is the path of an image"):
        run(items, tmp_path / "out", "baseline:constant")
    items = write_items(tmp_path / "data", 2, prompt="0.png", data_class="credentialed")
    with pytest.raises(ValueError, match="item number 1: field 'prompt' is the path") as caught:
        run(items, tmp_path / "out", "baseline:constant")
    assert "q0" not in str(caught.value) and "0.png" not in str(caught.value)


# What a terminal shows.


def test_text_of_a_model_and_of_rows_reaches_the_terminal_without_control_characters(tmp_path):
    bad = "\x1b]0;title\x07\x9b2J\u202e"
    items = write_items(tmp_path / "data", 2)
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    items.write_text("".join(json.dumps(r | {"task_name": f"a{bad}b"}) + "\n" for r in rows))
    with serving(lambda request, n: completion(f"yes{bad}")) as llm:
        done = subprocess.run(
            **program(items, tmp_path / "out", f"endpoint:m@{llm.url}"), capture_output=True
        )
    assert done.returncode == cli.DONE, done.stderr
    output = done.stdout + done.stderr
    assert "\\x1b]0;title" in output and not set("\x1b\x07\x9b\u202e") & set(output)
    texts = {r["text"] for r in journal.read_jsonl(tmp_path / "out" / "records.jsonl")}
    assert texts == {f"yes{bad}"}  # files keep the exact text
