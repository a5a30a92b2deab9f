"""`gnomon chat`: talk to a model, here or on a server.

Ctrl-C stops the answer, not the program. The conversation can be saved and loaded as JSON.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from gnomon.cli import common
from gnomon.errors import GnomonError, UsageError

HELP = """/help                 this
/set                  show the options; /set NAME VALUE changes one, /set NAME removes it
/system TEXT          set the system prompt (empty: none)
/clear                forget the conversation
/retry                answer the last message again
/save FILE            write the conversation as JSON
/load FILE            read one back
/info                 model and fingerprint
/bye                  leave (or Ctrl-D)
\"\"\"                   begin and end a message of several lines
Ctrl-C                stop the answer"""


class Conversation:
    """Messages and options, and what the slash commands do to them. Knows nothing of terminals."""

    def __init__(self, client: Any, options: dict[str, Any], system: str | None = None) -> None:
        self.client = client
        self.options = options
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def command(self, line: str) -> str:
        """Carry out `/name argument`; returns what to print. Raises UsageError for an unknown one."""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        actions = {
            "help": lambda: HELP, "?": lambda: HELP, "set": lambda: self._set(argument),
            "system": lambda: self._system(argument), "clear": self._clear, "save": lambda: self._save(argument),
            "load": lambda: self._load(argument), "info": self._info,
        }  # fmt: skip
        if name not in actions:
            from gnomon.registry import nearest

            raise UsageError(f"Unknown command /{name}.", hint=nearest(name, [*actions, "retry", "bye"]))
        return actions[name]()

    def forget_answer(self) -> bool:
        """Drop the last answer so that its question is asked again; False when there is none."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def _set(self, argument: str) -> str:
        name, _, value = argument.partition(" ")
        if not name:
            return "\n".join(f"{key} = {json.dumps(val)}" for key, val in self.options.items()) or "no options set"
        if not value.strip():
            self.options.pop(name, None)
            return f"{name} removed"
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value.strip()
        _check_option(name, parsed)
        self.options[name] = parsed
        return f"{name} = {json.dumps(parsed)}"

    def _system(self, text: str) -> str:
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        return "system prompt set" if text else "system prompt removed"

    def _clear(self) -> str:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        return "forgotten"

    def _save(self, path: str) -> str:
        if not path:
            raise UsageError("/save needs a file name.")
        from gnomon.models.cache import atomic_write

        content = {"model": self.client.model, "options": self.options, "messages": self.messages}
        with atomic_write(Path(path)) as out:
            out.write(json.dumps(content, indent=2, ensure_ascii=False).encode())
        return f"saved to {path}"

    def _load(self, path: str) -> str:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in content["messages"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no saved conversation: {error}.") from None
        self.messages, self.options = messages, dict(content.get("options") or {})
        return f"{len(messages)} messages loaded"

    def _info(self) -> str:
        return f"{self.client.model}  {getattr(self.client, 'fingerprint', '')}".strip()


def _check_option(name: str, value: Any) -> None:
    from gnomon.capability import Origin
    from gnomon.registry import Registry

    Registry.installed().parse({name: value}, Origin.COMMAND)


def _answer(talk: Conversation) -> None:
    """Stream one answer. What was said before Ctrl-C stays in the conversation."""
    said: list[str] = []
    stream = talk.client.stream(talk.messages, **talk.options)
    try:
        for chunk in stream:
            for finding in chunk.findings:
                if (span := finding.get("retract")) is not None:
                    said = [_taken_back("".join(said), *span)]
            said.append(chunk.text)
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        with suppress(AttributeError):
            stream.close()
        sys.stdout.write(" [stopped]")
    print()
    talk.messages.append({"role": "assistant", "content": "".join(said)})


def _taken_back(said: str, start: int, end: int) -> str:
    """What stands when the guard takes characters back, printed again: a terminal cannot unsay them."""
    stands = said[:start] + said[end:]
    sys.stdout.write(f"\n[the guard took back {end - start} characters; what stands:]\n{stands}")
    return stands


def _loop(talk: Conversation) -> None:
    """Read, answer, repeat. One bad message never ends the program."""
    read = _reader()
    while True:
        try:
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        try:
            if line.strip() in ("/bye", "/exit", "/quit"):
                return
            if line.strip() == "/retry":
                if talk.forget_answer():
                    _answer(talk)
            elif line.startswith("/"):
                print(talk.command(line.strip()))
            elif line.strip():
                talk.messages.append({"role": "user", "content": line})
                _answer(talk)
        except GnomonError as error:
            print(f"gnomon: {error}", file=sys.stderr)
            if talk.messages and talk.messages[-1]["role"] == "user":
                talk.messages.pop()


def _reader() -> Any:
    """A line editor with history on a terminal, plain lines when piped."""
    if not sys.stdin.isatty():
        return lambda: _multiline(lambda prompt: input())
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    from gnomon.models.cache import cache_dir

    history = cache_dir() / "chat-history"
    history.parent.mkdir(parents=True, exist_ok=True)
    session: Any = PromptSession(history=FileHistory(str(history)))
    return lambda: _multiline(session.prompt)


def _multiline(ask: Any) -> str:
    line: str = ask(">>> ")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].endswith('"""'):
        lines.append(ask("... "))
    lines[-1] = lines[-1][:-3]
    return "\n".join(lines)


def _run(ref: str | None, **values: Any) -> None:
    options = common.given_options(values)
    if values["url"]:
        from gnomon.client import RemoteClient

        _begin(RemoteClient(values["url"], ref, api_key=values["api_key"]), options, values["system"])
        return
    from gnomon.client import LocalClient

    with common.open_model(common.merged_settings(ref, values)) as model:
        _ = model.template  # a model without a chat template is an error now
        _begin(LocalClient(model), options, values["system"])


def _begin(client: Any, options: dict[str, Any], system: str | None) -> None:
    if sys.stdin.isatty():
        print(f"{client.model}. /help for commands, /bye to leave.", file=sys.stderr)
    _loop(Conversation(client, options, system))


app = common.command(
    _run,
    [
        common.argument("ref", "Model reference or recipe."),
        common.option("system", str | None, "System prompt."),
        common.option("url", str | None, "An OpenAI-compatible server, instead of loading the model here."),
        common.option("api_key", str | None, "That server's key.", envvar="GNOMON_API_KEY"),
        *common.loading_options(),
        *common.capability_flags(leave_out=("n", "echo", "logprobs")),
    ],
    """Talk to REF (default: smollm2-135m-instruct), or to a running server with --url.

    \b
    gnomon chat
    gnomon chat -t 0.7 --system "Answer in one sentence."
    gnomon chat --url http://127.0.0.1:8000/v1
    """,
)
