"""The batch interface of the local endpoint: files, batches and their faults."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from typing import Any

# what may be wrong with the result of a request
KINDS = ("400", "500", "garbage", "talk", "range", "shape", "missing", "unknown", "nameless")


class Batches:
    """Files and batches; a batch is processed when its state was asked for `polls` times.

    Attributes:
      polls: the number of requests for the state before a batch ends.
      status: the status with which batches end.
      problem: the code of the error of a batch whose status is "failed".
      processed: with another status than "completed", the number of requests that are answered.
      fault: prompt → one of `KINDS` or "".
      double: whether each answer is sent twice, the second time with another score.
      refused: path, such as "/files" or "/batches", → status code of every request to it.
      lost: the number of further requests that submit a batch, and get no answer.
      deleted: whether the files with the results do not exist.
      asked: method and path of each request.
      key: the key of the last request, which a careless endpoint repeats.
    """

    def __init__(self) -> None:
        self.polls, self.status, self.problem = 1, "completed", "invalid_request"
        self.processed = 0
        self.fault: Callable[[str], str] = lambda _: ""
        self.double = self.deleted = self.wants_other_length = False
        self.refused: dict[str, int] = {}
        self.lost = 0
        self.asked: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.sizes: list[int] = []
        self.key = ""

    def answer(self, server: Any, method: str, path: str, headers: Any, body: bytes,
               ) -> tuple[int, bytes]:
        """Return the status code and the body of an answer."""
        path = urllib.parse.urlsplit(path).path.removeprefix("/v1")
        self.asked.append((method, path))
        for start, status in self.refused.items():
            if path.startswith(start.removeprefix("!")) and (start[0] == "!") <= (method == "GET"):
                return status, _error(f"{self.key} {path} is refused")
        if (method, path) == ("POST", "/files"):
            boundary = headers["Content-Type"].split("boundary=")[1].strip('"').encode()
            parts = body.split(b"--" + boundary)
            file, = (part for part in parts if b'name="file"' in part)
            assert any(b'name="purpose"\r\n\r\nbatch' in part for part in parts)
            return 200, self._file(file.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n"))
        if (method, path) == ("POST", "/batches"):
            return self._create(json.loads(body))
        if (method, path) == ("GET", "/batches"):
            return 200, json.dumps({"object": "list", "has_more": False,
                                    "data": list(self.batches.values())}).encode()
        _, kind, name, *more = path.split("/")
        if kind == "files" and more == ["content"] and name in self.files and not self.deleted:
            return 200, self.files[name]
        if kind == "batches" and name in self.batches and not more:
            return 200, json.dumps(self._polled(server, self.batches[name])).encode()
        return 404, _error(f"{path} does not exist")

    def _file(self, data: bytes) -> bytes:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return json.dumps({"id": name, "object": "file", "bytes": len(data), "created_at": 0,
                           "filename": "x", "purpose": "batch"}).encode()

    def _create(self, body: dict[str, Any]) -> tuple[int, bytes]:
        assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
        lines = self.files[body["input_file_id"]].splitlines()
        self.sizes.append(len(lines))
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {
            "id": name, "object": "batch", "status": "validating", "metadata": body["metadata"],
            "input_file_id": body["input_file_id"], "created_at": 0, "polls": self.polls,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0}}
        if self.lost:
            self.lost -= 1
            return 500, _error("the answer is lost")
        return 200, json.dumps(self.batches[name]).encode()

    def _polled(self, server: Any, batch: dict[str, Any]) -> dict[str, Any]:
        batch["polls"] -= 1
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            if batch["polls"] <= 0:
                self._process(server, batch)
        return batch

    def _process(self, server: Any, batch: dict[str, Any]) -> None:
        """Answer the requests of a batch, and write the files with the results."""
        batch["status"] = self.status
        if self.status == "failed":
            batch["errors"] = {"object": "list", "data": [
                {"code": self.problem, "message": f"{self.key} is not allowed"}]}
            return
        good, bad = [], []
        lines = self.files[batch["input_file_id"]].splitlines()
        for i, line in enumerate(lines):
            one = json.loads(line)
            assert (one["method"], one["url"]) == ("POST", "/v1/chat/completions")
            if self.status != "completed" and i >= self.processed:
                if self.status == "expired":
                    bad.append({"custom_id": one["custom_id"], "response": None, "error": {
                        "code": "batch_expired", "message": "it was not executed in time"}})
                continue
            answer, error = self._one(server, one)
            good += answer
            bad += error
        for field, some in (("output_file_id", good), ("error_file_id", bad)):
            if some:
                text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in some)
                batch[field] = json.loads(self._file(text.encode() + b"\n"))["id"]
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}

    def _one(self, server: Any, one: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        """Return the lines for a request in the files of answers and of errors."""
        import fake_endpoint as fake

        body = one["body"]
        prompt = body["messages"][-1]["content"]
        kind, key = self.fault(prompt), one["custom_id"]
        server.asked[prompt] += 1
        if self.wants_other_length and "max_tokens" in body:
            kind, text = "400", "'max_tokens' is not supported; use 'max_completion_tokens'"
        else:
            text = f"request of {self.key} failed"
        if kind.isdigit():
            return [], [{"custom_id": key, "error": None, "response": {
                "status_code": int(kind), "body": {"error": {"message": text, "code": "no"}}}}]
        said = {"talk": f"It is hard to say, {self.key}.", "range": "7"}.get(
            kind, str(fake.score(prompt)))
        server.sell(prompt)
        value = fake.completion(body["model"], prompt, said)
        if kind == "shape":
            value["choices"] = []
        line: dict[str, Any] = {"id": "r", "custom_id": key, "error": None,
                                "response": {"status_code": 200, "body": value}}
        if kind == "unknown":
            line["custom_id"] = "f" * 32
        if kind == "nameless":
            del line["custom_id"]
        if kind == "missing":
            return [], []
        if kind == "garbage":
            return ["<html>" + self.key], []
        other = fake.completion(body["model"], prompt, str(3 - fake.score(prompt)))
        return [line, line | {"response": {"status_code": 200, "body": other}}][
            :1 + self.double], []


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "code": "no"}}).encode()
