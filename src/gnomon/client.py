"""The chat interface that programs, rails, rlm and agents drive: the local engine or any OpenAI-compatible server.

Both clients take messages and options and give `Generation`s and `Chunk`s; a program never knows which one it has.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import httpx

from gnomon.errors import GnomonError, ModelNotFound, NotReady, Overloaded, UsageError
from gnomon.generation import Chunk, Generation, TokenLogprob, Usage
from gnomon.model import Model
from gnomon.submission import join

Messages = Sequence[Mapping[str, Any]]


class Client(Protocol):
    """What a program may ask of a model."""

    model: str

    def chat(self, messages: Messages, **options: Any) -> Generation: ...
    def stream(self, messages: Messages, **options: Any) -> Iterator[Chunk]: ...
    async def achat(self, messages: Messages, **options: Any) -> Generation: ...
    def astream(self, messages: Messages, **options: Any) -> AsyncIterator[Chunk]: ...


class LocalClient:
    """The Client interface over a Model in this process."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.model = model.name

    def chat(self, messages: Messages, **options: Any) -> Generation:
        return _only(self._model.chat(messages, **options))

    def stream(self, messages: Messages, **options: Any) -> Iterator[Chunk]:
        return self._model.stream(messages, **options)

    async def achat(self, messages: Messages, **options: Any) -> Generation:
        return _only(await self._model.achat(messages, **options))

    def astream(self, messages: Messages, **options: Any) -> AsyncIterator[Chunk]:
        return self._model.astream(messages, **options)


class RemoteClient:
    """The Client interface over an OpenAI-compatible server. base_url: e.g. http://127.0.0.1:8000/v1."""

    def __init__(
        self, base_url: str, model: str | None = None, *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = httpx.Timeout(timeout, connect=5.0)
        self.model = model or self.models()[0]

    def models(self) -> list[str]:
        """Names the server answers to."""
        with httpx.Client(headers=self._headers, timeout=self._timeout) as http:
            reply = self._checked(self._send(http, "GET", "/models"))
        return [entry["id"] for entry in reply.json()["data"]]

    def chat(self, messages: Messages, **options: Any) -> Generation:
        return join(list(self.stream(messages, **options)))

    def stream(self, messages: Messages, **options: Any) -> Iterator[Chunk]:
        try:
            with (
                httpx.Client(headers=self._headers, timeout=self._timeout) as http,
                http.stream("POST", f"{self.base_url}/chat/completions", json=self._body(messages, options)) as reply,
            ):
                if reply.is_error:
                    reply.read()
                    self._checked(reply)
                yield from _chunks(reply.iter_lines())
        except httpx.TransportError as error:
            raise self._unreachable(error) from None

    async def achat(self, messages: Messages, **options: Any) -> Generation:
        return join([chunk async for chunk in self.astream(messages, **options)])

    async def astream(self, messages: Messages, **options: Any) -> AsyncIterator[Chunk]:
        try:
            async with (
                httpx.AsyncClient(headers=self._headers, timeout=self._timeout) as http,
                http.stream("POST", f"{self.base_url}/chat/completions", json=self._body(messages, options)) as reply,
            ):
                if reply.is_error:
                    await reply.aread()
                    self._checked(reply)
                parser = _StreamParser()
                async for line in reply.aiter_lines():
                    for chunk in parser.push(line):
                        yield chunk
                yield parser.finish()
        except httpx.TransportError as error:
            raise self._unreachable(error) from None

    def _body(self, messages: Messages, options: Mapping[str, Any]) -> dict[str, Any]:
        fields = {key: value for key, value in options.items() if value is not None}
        if "logprobs" in fields:
            fields["top_logprobs"], fields["logprobs"] = fields["logprobs"], True
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, "messages": [dict(message) for message in messages], **stream, **fields}

    def _send(self, http: httpx.Client, method: str, path: str) -> httpx.Response:
        try:
            return http.request(method, self.base_url + path)
        except httpx.TransportError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> NotReady:
        return NotReady(f"No answer from {self.base_url}: {error}.", hint="Is the server running? Try `gnomon serve`.")

    def _checked(self, reply: httpx.Response) -> httpx.Response:
        if not reply.is_error:
            return reply
        try:
            body = reply.json()["error"]
            message, param = str(body["message"]), body.get("param")
        except (ValueError, KeyError, TypeError):
            message, param = f"HTTP {reply.status_code}", None
        kinds: dict[int, type[GnomonError]] = {404: ModelNotFound, 429: Overloaded, 503: NotReady}
        kind = kinds.get(reply.status_code, UsageError if reply.status_code < 500 else GnomonError)
        raise kind(f"{self.base_url}: {message}", param=param)


class _StreamParser:
    """Server-sent lines of one choice -> Chunks. The usage comes after the finish reason, so the end waits for it."""

    def __init__(self) -> None:
        self.reason: Any = None
        self.usage: Usage | None = None
        self.last: dict[str, Any] = {}

    def push(self, line: str) -> list[Chunk]:
        if not line.startswith("data:"):
            return []
        data = line[5:].strip()
        if data == "[DONE]":
            return []
        event = json.loads(data)
        if "error" in event:
            raise GnomonError(str(event["error"].get("message", event["error"])))
        self.last = event
        if usage := event.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            self.usage = Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)
        chunks = []
        for choice in event.get("choices", []):
            self.reason = choice.get("finish_reason") or self.reason
            text = (choice.get("delta") or {}).get("content") or ""
            logprobs = _logprobs(choice.get("logprobs"))
            findings = tuple((choice.get("guard") or {}).get("findings") or ())
            if text or logprobs or findings:
                chunks.append(self._chunk(choice.get("index", 0), text, logprobs, findings))
        return chunks

    def finish(self) -> Chunk:
        if self.reason is None:
            raise GnomonError("The server closed the stream before the answer was complete.")
        chunk = self._chunk(0, "", None)
        return Chunk(**{**chunk.__dict__, "finish_reason": self.reason, "usage": self.usage or Usage(0, 0)})

    def _chunk(
        self, index: int, text: str, logprobs: list[TokenLogprob] | None, findings: tuple[dict[str, Any], ...] = ()
    ) -> Chunk:
        return Chunk(
            id=self.last.get("id", ""),
            index=index,
            text=text,
            logprobs=logprobs,
            token_ids=[t.token_id for t in logprobs or [] if t.token_id >= 0],
            seed=self.last.get("seed") or 0,
            fingerprint=self.last.get("system_fingerprint") or "",
            findings=findings,
        )


def _chunks(lines: Iterator[str]) -> Iterator[Chunk]:
    parser = _StreamParser()
    for line in lines:
        yield from parser.push(line)
    yield parser.finish()


def _logprobs(block: Any) -> list[TokenLogprob] | None:
    """OpenAI's logprobs block -> ours; the wire has no token ids unless the server adds `token_id`."""
    if not block or not block.get("content"):
        return None

    def one(entry: Mapping[str, Any]) -> TokenLogprob:
        raw = bytes(entry.get("bytes") or [])
        top = tuple(one(other) for other in entry.get("top_logprobs") or [])
        return TokenLogprob(entry.get("token_id", -1), entry["token"], raw, entry["logprob"], top)

    return [one(entry) for entry in block["content"]]


def _only(result: Generation | list[Generation]) -> Generation:
    if isinstance(result, list):
        raise UsageError("A program's client takes one answer at a time.", hint="Leave out `n`.", param="n")
    return result
