"""The client of an endpoint: its requests, and how responses and errors are read."""

from __future__ import annotations

import json
from types import SimpleNamespace as Space

import pytest

import jaxpersona as jp
from jaxpersona.judges import endpoint as module
from jaxpersona.judges.endpoint import BatchState, Endpoint, Failure, OtherLength, Reply

openai = pytest.importorskip("openai")
KEY = "sk-secret-0123456789"


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = Endpoint("judge-1", url="http://localhost:8000/v1", max_tokens=7, temperature=0.5)
    yield made
    made.close()


def use(client, **parts):
    """Replace the client of the package by given parts."""
    client.close()
    client._client = Space(close=lambda: None, **parts)


def failure_of(client, error, length=""):
    """Return the failure that an error of the package becomes."""
    with pytest.raises(Failure) as caught, client._translated("a thing", length):
        raise error
    return caught.value


def properties(found):
    return found.again, found.fatal, found.after, found.maybe_paid, found.status


def test_a_timeout_may_be_paid_and_is_repeated(client):
    """The endpoint may have answered."""
    found = failure_of(client, openai.APITimeoutError(request=None))
    assert str(found) == "no answer before the timeout"
    assert properties(found) == (True, False, None, True, None)


@pytest.mark.parametrize(("cause", "text", "paid"), [
    ("ConnectError", "boom", False), ("ConnectTimeout", "boom", False),
    ("PoolTimeout", "boom", False), ("ReadError", "boom", True), (None, "down", True)])
def test_a_request_that_was_not_sent_is_not_paid(client, cause, text, paid):
    """The cause tells whether there was a connection."""
    error = openai.APIConnectionError(message=f"down {KEY}", request=None)
    error.__cause__ = None if cause is None else type(cause, (Exception,), {})(f"boom {KEY}")
    found = failure_of(client, error)
    assert str(found) == f"the connection failed ({text} [key])"
    assert properties(found) == (True, False, None, paid, None)


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, AttributeError, IndexError,
                                   openai.OpenAIError])
def test_a_malformed_response_may_be_paid_and_is_repeated(client, error):
    """The message is one line without the key."""
    found = failure_of(client, error(f"a\nb {KEY}"))
    assert str(found).startswith("the answer is not a thing (") and KEY not in str(found)
    assert "\n" not in str(found) and properties(found) == (True, False, None, True, None)


def status(code, message, headers=None, name=""):
    return openai.APIStatusError(message, body={"code": name}, response=Space(
        status_code=code, headers=headers or {}, request=None))


def test_only_a_model_that_wants_the_other_field_changes_it(client):
    """Status 400 to a request with `max_tokens`, and a message with the other name."""
    said = "use 'max_completion_tokens' instead"
    for code, text, length in ((400, said, ""), (422, said, "max_tokens"),
                               (400, "too long", "max_tokens"),
                               (400, said, "max_completion_tokens")):
        found = failure_of(client, status(code, text), length)
        assert type(found) is Failure and not found.again and client.length == "max_tokens"
        assert str(found) == f"HTTP {code}: {text}" and found.status == code
    found = failure_of(client, status(400, said), "max_tokens")
    assert type(found) is OtherLength and client.length == "max_completion_tokens"
    assert properties(found) == (True, False, 0.0, False, None)
    assert json.loads(client.request("k", "p"))["body"] == {
        "model": "judge-1", "messages": [{"role": "user", "content": "p"}], "temperature": 0.5,
        "max_completion_tokens": 7}


def test_a_refusal_of_all_requests_names_its_reason(client):
    """The status and the message of the endpoint follow in brackets."""
    found = failure_of(client, status(401, f"bad {KEY}"))
    assert str(found) == "the endpoint rejects the API key (HTTP 401: bad [key])"
    assert properties(found) == (False, True, None, False, 401)
    found = failure_of(client, status(429, "no money", name="insufficient_quota"))
    assert str(found) == "the quota is used up (HTTP 429: no money)" and found.fatal
    found = failure_of(client, status(503, "busy", {"retry-after-ms": "1500"}))
    assert properties(found) == (True, False, 1.5, False, 503)


def test_a_line_of_a_batch_file_is_a_request_with_its_key(client):
    """It ends with a newline."""
    line = client.request("k1", "Who é?")
    assert line.endswith(b"}\n") and line.count(b"\n") == 1
    assert json.loads(line) == {
        "custom_id": "k1", "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": "judge-1", "messages": [{"role": "user", "content": "Who é?"}],
            "temperature": 0.5, "max_tokens": 7}}


def test_a_file_is_uploaded_for_a_batch_with_ten_minutes(client):
    """The identifier must be one line without the key."""
    seen, answer = [], Space(id="file-1")

    def options(timeout):
        seen.append(timeout)
        return Space(files=Space(create=lambda **named: seen.append(named) or answer))

    use(client, with_options=options)
    assert client.upload("b1", b"lines") == "file-1"
    assert seen == [600.0, {"file": ("jaxpersona-b1.jsonl", b"lines", "application/jsonl"),
                            "purpose": "batch"}]
    for wrong in ("", "a\nb", KEY, 5, None, " a"):
        answer.id = wrong
        with pytest.raises(Failure, match="the answer is not a file .*no valid id"):
            client.upload("b1", b"")


def test_a_batch_is_submitted_with_its_name_and_found_by_it(client):
    """The newest thousand batches are searched, in pages of a hundred."""
    seen, listed = [], []
    use(client, batches=Space(
        create=lambda **named: seen.append(named) or Space(id="batch-1", status="validating"),
        list=lambda **named: seen.append(named) or iter(listed)))
    assert client.submit("b1", "file-1") == BatchState("batch-1", "validating")
    assert seen.pop() == {"input_file_id": "file-1", "endpoint": "/v1/chat/completions",
                          "completion_window": "24h", "metadata": {"jaxpersona": "b1"}}
    listed += [Space(id="x", status="failed", metadata=None), Space(id="y", status="failed"),
               Space(id="z", status="failed", metadata={"jaxpersona": "other"})]
    assert client.find_batch("b1") is None and seen == [{"limit": 100}]
    wanted = Space(id="batch-1", status="COMPLETED", metadata={"jaxpersona": "b1"})
    listed[3:] = [listed[0]] * 996 + [wanted]
    assert client.find_batch("b1") == BatchState("batch-1", "completed")
    listed.insert(0, listed[0])
    assert client.find_batch("b1") is None


@pytest.mark.parametrize(("name", "ended"), [
    ("completed", True), ("failed", True), ("expired", True), ("cancelled", True),
    ("canceled", True), ("validating", False), ("in_progress", False), ("finalizing", False),
    ("cancelling", False)])
def test_the_end_of_a_batch_is_known_by_its_status(name, ended):
    """A batch that is being cancelled may still get answers."""
    assert BatchState("b", name).ended is ended


def test_the_first_three_reasons_of_a_failed_batch_are_kept(client):
    """A reason without a code or a message is not an error."""
    reasons = [Space(code=code, message=f"{code} {KEY}") for code in "abcd"]
    value = Space(id="b", status="failed", errors=Space(data=reasons))
    use(client, batches=Space(retrieve=lambda name: value))
    assert client.batch("b").problems == "a: a [key]; b: b [key]; c: c [key]"
    value.errors = Space(data=[Space(code="x"), Space(message="y")])
    assert client.batch("b").problems == "x: ; : y"
    value.errors = Space(data=None)
    assert client.batch("b").problems == ""


def test_a_file_with_results_may_have_the_largest_size(client, monkeypatch):
    """One byte more is a failure that may be paid."""
    parts, seen = [b"12345", b"67890"], []

    class Response:
        def __init__(self, file):
            seen.append(file)

        def __enter__(self):
            return Space(iter_bytes=lambda: iter(parts))

        def __exit__(self, *_):
            """Close nothing."""

    use(client, with_options=lambda timeout: seen.append(timeout) or Space(files=Space(
        with_streaming_response=Space(content=Response))))
    monkeypatch.setattr(module, "RESULT_BYTES", 10)
    assert client.download("f") == b"1234567890" and seen == [600.0, "f"]
    parts.append(b"1")
    with pytest.raises(Failure, match="has more than 10 bytes; give a smaller") as caught:
        client.download("f")
    assert caught.value.maybe_paid and not caught.value.again


def outcome(client, **fields):
    return client.outcome(json.dumps({"custom_id": "k", **fields}).encode())


def test_a_line_of_results_is_an_answer_or_a_failure(client):
    """An error counts even if there is a response."""
    body = {"choices": [{"message": {"content": "2"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 1}}
    good = {"status_code": 200, "body": body}
    assert outcome(client, response=good) == ("k", Reply("2", 5, 1))
    for fields, text, again, paid in (
            ({"response": good, "error": {"code": "late", "message": "too late"}},
             "late: too late", False, False),
            ({"response": None, "error": {"code": "late", "message": KEY}}, "late: [key]", False,
             False),
            ({"response": {"status_code": 429, "body": {"error": {"message": "slow"}}}},
             "HTTP 429: slow", True, False),
            ({"response": {"status_code": 400, "body": {"error": {"message": "bad"}}}},
             "HTTP 400: bad", False, False),
            ({"response": {"status_code": 200, "body": {}}}, "the answer is not a chat", True,
             True),
            ({"response": {"status_code": 500}}, "the answer is not a chat", True, True),
            ({"response": {"status_code": "500"}}, "the answer is not a chat", True, True),
            ({}, "the answer is not a chat completion", True, True)):
        key, found = outcome(client, **fields)
        assert key == "k" and str(found).startswith(text), found
        assert (found.again, found.maybe_paid) == (again, paid), text
    other = {"status_code": 400, "body": {"error": {"message": "use max_completion_tokens"}}}
    assert type(outcome(client, response=other)[1]) is OtherLength


@pytest.mark.parametrize("line", [b"", b"{", b"5", b"[]", b"null", b'"k"', b"{}", b"\xff",
                                  b'{"custom_id": 5}', b'{"custom_id": null}', b"[" * 10**5])
def test_a_line_without_a_key_has_no_outcome(client, line):
    """It is ignored, as its request is unknown."""
    assert client.outcome(line) is None


@pytest.mark.parametrize(("url", "wanted"), [
    ("http://host:0/v1", "not an HTTP URL"), ("http:///v1", "not an HTTP URL"),
    ("https://host/v1#part", "a fragment"), ("http://user@host/v1", "contains a user"),
    ("http://:secret@host/v1", "a password"), ("http://[::1/v1", "not an HTTP URL")])
def test_a_url_with_more_than_a_place_is_refused(url, wanted):
    """The key belongs in an environment variable."""
    with pytest.raises(jp.UserError, match=wanted):
        Endpoint("m", url=url)


def test_the_key_comes_from_the_named_variable(monkeypatch):
    """Only OpenAI's endpoint needs one; the error names the variable."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MINE", "mine")
    monkeypatch.delenv("NONE", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, key in (("MINE", "mine"), ("OPENAI_API_KEY", KEY), ("NONE", "none")):
        made = Endpoint("m", url="https://host/v1", key_env=name)
        assert made._client.api_key == key and made._client.timeout == 60.0
        made.close()
    made = Endpoint("m", key_env="MINE")
    assert made.url == "https://api.openai.com/v1"
    made.close()
    for url in (None, "https://api.openai.com/v2"):
        with pytest.raises(jp.UserError, match="the environment variable NONE is not set"):
            Endpoint("m", url=url, key_env="NONE")


def test_an_invalid_header_of_a_delay_is_followed_by_the_other():
    """A date in the past is no delay."""
    found = module.retry_after({"retry-after-ms": "soon", "retry-after": "2"})
    assert found == 2.0
    assert module.retry_after({"retry-after-ms": "nan", "retry-after": "2"}) == 2.0
    past = {"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}
    assert module.retry_after(past, now=140.0) == 0.0
    assert module.retry_after(past) == 0.0
