"""The command as a user types it: exit codes, clean output, clear errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gnomon.cli.main import COMMANDS, run
from gnomon.loading import load


def gnomon(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gnomon", *arguments],
        input=stdin,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_help_lists_every_command_and_loads_no_room() -> None:
    code = (
        "import sys; from gnomon.cli.main import run; run(['--help']); "
        "sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert "Usage: gnomon" in capsys.readouterr().out


def test_generate_prints_the_text_alone(tiny_dir: Path) -> None:
    done = gnomon("generate", "abc", "-m", str(tiny_dir), "--max-tokens", "5", "--threads", "1")
    piped = gnomon("generate", "-", "-m", str(tiny_dir), "--max-tokens", "5", "--threads", "1", stdin=b"abc")
    assert done.returncode == piped.returncode == 0
    assert done.stdout == piped.stdout and done.stderr == ""
    whole = json.loads(
        gnomon("generate", "abc", "-m", str(tiny_dir), "--max-tokens", "5", "--json", "--logprobs", "1").stdout
    )
    assert whole["text"] + "\n" == done.stdout
    assert len(whole["logprobs"]) == len(whole["token_ids"]) and whole["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["frobnicate"], 2, "No such command"),
        (["pul"], 2, "Did you mean `pull`"),
        (["generate", "x", "-m", "no-such-model"], 1, "Unknown model `no-such-model`"),
        (["generate", ""], 2, "The prompt is empty"),
        (["generate", "x", "-m", "TINY", "-t", "-1"], 2, "temperature"),
        (["generate", "x", "-m", "TINY", "--logit-bias", "{bad"], 2, "not valid JSON"),
        (["generate", "x" * 600, "-m", "TINY"], 2, "context of 512"),
        (["generate", "x", "-m", "TINY", "--profile", "fp7"], 2, "fp32, bf16"),
        (["generate", "x", "-m", "TINY", "--device", "cuda"], 2, "cuda"),
        (["generate", "x", "--max-tokens", "many"], 2, "valid integer"),
        (["serve", "TINY", "--host", "0.0.0.0", "--port", "0"], 2, "--no-auth"),
        (["show", "gemma-3-270m-typo"], 1, "gemma-3-270m"),
        (["rm", "nothing"], 1, "not in the cache"),
        (["completion", "tcsh"], 2, "bash, zsh, fish"),
        (["ps", "--url", "http://127.0.0.1:9"], 1, "gnomon serve"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_right_exit_code(
    arguments: list[str], code: int, says: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(tiny_dir) if a == "TINY" else a for a in arguments]) == code
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said


def test_standard_input_that_is_not_text_is_refused(tiny_dir: Path) -> None:
    done = gnomon("generate", "-", "-m", str(tiny_dir), stdin=b"ab\xff")
    assert done.returncode == 2 and "byte 2" in done.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in gnomon("--debug", "show", "no-such-model").stderr


def test_show_ls_doctor_and_version_speak_json(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*arguments: str) -> object:
        assert run([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    facts = ask("show", str(tiny_dir), "--tensors")
    assert isinstance(facts, dict) and facts["network"] == "LlamaForCausalLM" and len(facts["identity"]) == 64
    assert any(tensor["name"] == "model.norm.weight" for tensor in facts["tensors"])
    names = ask("ls", "--all")
    assert isinstance(names, list) and {"minilm-l6-v2"} <= {row["name"] for row in names}
    doctor = ask("doctor")
    assert isinstance(doctor, dict) and doctor["kernels"].startswith(("native", "torch:"))
    assert ask("version")


def test_settings_come_in_their_order_and_say_from_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    user = tmp_path / "user.yaml"
    user.write_text("serve: {port: 1, host: 127.0.0.9}\nsampling: {temperature: 0.1}\n")
    (tmp_path / "gnomon.yaml").write_text("gnomon: 1\nserve: {port: 2}\n")
    monkeypatch.setenv("GNOMON_CONFIG", str(user))
    monkeypatch.setenv("GNOMON_SERVE_MAX_WAITING", "7")
    assert run(["config", "show", "--origin", "--json"]) == 0
    rows = {row["key"]: (row["value"], row["origin"]) for row in json.loads(capsys.readouterr().out)}
    assert rows["serve.port"] == (2, "gnomon.yaml")
    assert rows["serve.host"] == ("127.0.0.9", str(user))
    assert rows["serve.max_waiting"] == (7, "GNOMON_SERVE_MAX_WAITING")
    assert rows["sampling.temperature"] == (0.1, str(user))
    assert rows["threads"][1] == "default"


def test_a_wrong_recipe_names_the_key_and_the_near_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    for content, says in [
        ("gnomon: 1\nsampling: {temperatur: 1}\n", "`sampling.temperatur`. Did you mean `temperature`"),
        ("gnomon: 1\nmodle: x\n", "Did you mean `model`"),
        ("gnomon: 2\n", "gnomon"),
        ("gnomon: [\n", "not valid YAML"),
        ("- 1\n", "mapping"),
    ]:
        recipe.write_text(content)
        assert run(["config", "check", str(recipe)]) == 2
        assert says in capsys.readouterr().err


def test_the_recipes_schema_is_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "serve", "sampling", "stop", "logit_bias"} <= set(schema["properties"])


def test_score_puts_the_likelier_first(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["score", "abc", "d", "e", "-m", str(tiny_dir), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored[0]["logprob"] >= scored[1]["logprob"]


def test_chat_holds_a_conversation_and_obeys_its_commands(tiny_dir: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = [
        "/help",
        "hello",
        '"""two',
        'lines"""',
        "/set temperature 0.5",
        "/set temperatur 1",
        f"/save {saved}",
        "/info",
        "/bye",
    ]
    done = gnomon("chat", str(tiny_dir), "--max-tokens", "4", "--threads", "1", stdin="\n".join(lines).encode())
    assert done.returncode == 0, done.stderr
    content = json.loads(saved.read_text())
    assert [m["role"] for m in content["messages"]] == ["user", "assistant", "user", "assistant"]
    assert content["messages"][2]["content"] == "two\nlines"
    assert content["options"] == {"max_tokens": 4, "temperature": 0.5}
    assert "Did you mean `temperature`" in done.stderr


@pytest.fixture
def server(tiny_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gnomon", "serve", str(tiny_dir), "--port", "0", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_where_drafts_come_from_is_said_by_flag_recipe_or_environment_and_changes_no_text(
    tiny_dir: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "gnomon.yaml"
    recipe.write_text(f"gnomon: 1\nmodel: {tiny_dir}\nengine:\n  speculation: off\n")
    base = ("generate", "abcabcabc", "--max-tokens", "8", "--threads", "1")
    texts = {gnomon(*base, "-m", str(tiny_dir), "--speculation", kind).stdout for kind in ("off", "lookup", "draft")}
    texts |= {gnomon(*base, "-m", str(recipe)).stdout}
    texts |= {gnomon(*base, "-m", str(tiny_dir), GNOMON_ENGINE_SPECULATION="off").stdout}
    assert len(texts) == 1 and texts != {""}
    wrong = gnomon(*base, "-m", str(tiny_dir), "--speculation", "luck")
    assert wrong.returncode != 0 and "Unknown speculation `luck`" in wrong.stderr


def test_serve_announces_itself_streams_and_stops_cleanly(server: subprocess.Popen[str], tiny_dir: Path) -> None:
    assert server.stderr is not None
    lines = []
    while not (lines and lines[-1].startswith("Ready")):
        lines.append(server.stderr.readline())
        assert lines[-1], "".join(lines)
    address = next(line.split()[1] for line in lines if "studio" in line).rstrip("/")
    taken = gnomon("serve", str(tiny_dir), "--port", address.rsplit(":", 1)[1])
    assert taken.returncode == 2 and "is in use" in taken.stderr
    body = {"model": tiny_dir.name, "messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body | {"max_tokens": 60}, timeout=60) as reply:
        seen = reply.iter_lines()
        next(seen)
        server.send_signal(signal.SIGINT)
        rest = [line for line in seen if line]
    assert rest[-1] == "data: [DONE]"  # the stream was finished, not cut
    assert '"finish_reason":"length"' in rest[-2]
    assert server.wait(20) == 0
    server.stderr.close()


def test_a_port_is_known_to_be_taken_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        started = time.monotonic()
        done = gnomon("serve", "no-such-model", "--port", str(taken.getsockname()[1]))
    assert "is in use" in done.stderr and time.monotonic() - started < 20


def test_a_recipe_loads_the_same_through_python_and_the_command(tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tiny").symlink_to(tiny_dir)
    (folder / "chat.jinja").write_text("{{ messages[0].content }}")
    recipe = folder / "r.yaml"
    recipe.write_text(
        "gnomon: 1\nmodel: ./tiny\nprofile: bf16\nthreads: 1\nchat_template: chat.jinja\nengine: {max_context: 96}\n"
    )
    with load(recipe) as model:
        assert (model.profile.dtype, model.max_context) == ("bf16", 96)  # type: ignore[union-attr]
        text = model.chat("abc", max_tokens=3).text  # type: ignore[union-attr]
        assert text == model.generate("abc", max_tokens=3).text
    with load(recipe, profile="fp32", max_context=64) as model:
        assert (model.profile.dtype, model.max_context) == ("fp32", 64)  # type: ignore[union-attr]
    told = gnomon("generate", "abc", "--model", str(recipe), "--max-tokens", "3", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["text"] == text


def test_options_given_to_serve_hold_for_requests_that_say_nothing(tiny_dir: Path) -> None:
    command = [sys.executable, "-m", "gnomon", "serve", str(tiny_dir), "--port", "0", "--threads", "1"]
    command += ["--max-tokens", "4", "--guard", '{"output": [{"use": "words", "words": ["zzz"], "action": "flag"}]}']
    process = subprocess.Popen([*command, "--served-name", "t"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines: list[str] = []
        while not lines or "Ready" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        url = next(line.split()[1] for line in lines if line.strip().startswith("API"))
        body = {"model": "t", "prompt": "abc", "ignore_eos": True}
        answer = httpx.post(f"{url}/completions", json=body, timeout=30).json()
        assert answer["usage"]["completion_tokens"] == 4
        answer = httpx.post(f"{url}/completions", json=body | {"max_tokens": 2}, timeout=30).json()
        assert answer["usage"]["completion_tokens"] == 2
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def test_what_the_guard_takes_back_is_said_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    from gnomon.cli.chat import Conversation, _answer
    from gnomon.generation import Chunk

    class Client:
        def stream(self, messages: Any, **options: Any) -> Iterator[Chunk]:
            yield Chunk("x", 0, "All is well. Some ugly")
            yield Chunk("x", 0, " Enough.", findings=({"rule": "r", "action": "block", "retract": [12, 22]},))

    talk = Conversation(Client(), {})
    _answer(talk)
    assert talk.messages == [{"role": "assistant", "content": "All is well. Enough."}]
    told = "All is well. Some ugly\n[the guard took back 10 characters; what stands:]\nAll is well. Enough.\n"
    assert capsys.readouterr().out == told
