"""The command `gnomon`: finds the subcommand, loads only its file, turns errors into sentences and exit codes.

Exit codes: 0 ok, 1 failure, 2 usage, 3 blocked by a guard, 130 interrupted. No traceback without --debug.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("gnomon.cli.serve", "Serve models over an OpenAI-compatible API, with the studio page."),
    "chat": ("gnomon.cli.chat", "Talk to a model in the terminal."),
    "generate": ("gnomon.cli.generate", "Continue a prompt."),
    "embed": ("gnomon.cli.embed", "Turn texts into vectors."),
    "score": ("gnomon.cli.score", "How likely is a continuation?"),
    "learn": ("gnomon.cli.learn", "Train a model by rewards, on the sampler's own arithmetic."),
    "compare": ("gnomon.cli.compare", "Models, merges and ensembles on the same texts, with intervals."),
    "pull": ("gnomon.cli.pull", "Fetch a model of the zoo into the cache."),
    "ls": ("gnomon.cli.ls", "List models."),
    "show": ("gnomon.cli.show", "What a model reference is: network, tensors, identity, licence."),
    "rm": ("gnomon.cli.rm", "Remove a fetched model."),
    "ps": ("gnomon.cli.ps", "What a running server serves."),
    "patch": ("gnomon.cli.patch", "Patches: create, show, combine, apply and revert changes of weights."),
    "runs": ("gnomon.cli.runs", "The ledger of what was generated: list, show, remove."),
    "replay": ("gnomon.cli.replay", "Generate a run of the ledger again and compare it bit for bit."),
    "explain": ("gnomon.cli.explain", "Why each token of a run of the ledger is there."),
    "config": ("gnomon.cli.config", "Settings: where they come from, and the recipe's schema."),
    "doctor": ("gnomon.cli.doctor", "What this machine and installation can do."),
    "completion": ("gnomon.cli.completion", "Shell completion for bash, zsh or fish."),
    "version": ("gnomon.cli.version", "The version."),
}


class LazyGroup(TyperGroup):
    """Subcommands are imported when they run, so that --help stays instant."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *sorted(set(_capability_commands()) - set(COMMANDS))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS:
            return _load(f"{COMMANDS[cmd_name][0]}:app", cmd_name)
        found = _capability_commands().get(cmd_name)
        return _load(found[0], cmd_name) if found else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, text) for name, (_, text) in COMMANDS.items()]
        rows += [(name, text) for name, (_, text) in sorted(_capability_commands().items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            from gnomon.errors import UsageError
            from gnomon.registry import nearest

            raise UsageError(f"No such command `{args[0]}`.", hint=nearest(args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


def _capability_commands() -> dict[str, tuple[str, str]]:
    """Commands that installed capabilities bring: name -> (import string, help)."""
    from gnomon.registry import Registry

    found = Registry.installed().capabilities.values()
    return {capability.name: (capability.commands, capability.help) for capability in found if capability.commands}


def _load(path: str, name: str) -> Any:
    module, _, attribute = path.partition(":")
    command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
    command.name = name
    return command


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        from gnomon.version import __version__

        print(f"gnomon {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks and debug logs."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress bars, no notes."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Improve open-weight language models at every seam between weights and text.

    Begin with `gnomon chat`, or `gnomon serve` and open the address it prints.
    """
    if debug:
        os.environ["GNOMON_DEBUG"] = "1"
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s" if debug else "%(message)s",
        stream=sys.stderr,
    )
    if quiet:
        from gnomon.progress import set_quiet

        set_quiet(True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    # torch's modules are a million objects that live to the end: walking them for garbage, again and again while they
    # are imported and once more on leaving, took a third of a short command's time
    gc.set_threshold(50_000, 20, 20)
    code = run(arguments)
    if "triton" not in sys.modules:  # its bindings complain of whatever is not collected
        gc.freeze()
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="gnomon", standalone_mode=False)
        sys.stdout.flush()
    except Abort:
        return 130
    except TyperException as error:
        if (show := getattr(error, "show", None)) is not None:
            show()
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left: nothing more to say
        return 0
    except Exception as error:
        return _report(error)
    return result if isinstance(result, int) else 0


def _report(error: Exception) -> int:
    """One clear sentence for a user's mistake; a bug says that it is one."""
    from gnomon.errors import GnomonError

    if os.environ.get("GNOMON_DEBUG"):
        import traceback

        traceback.print_exc()
    if isinstance(error, GnomonError):
        message, code = str(error), error.exit_code
    elif isinstance(error, OSError) and error.strerror:
        message, code = f"{error.strerror}: {error.filename}" if error.filename else error.strerror, 1
    else:
        message, code = f"{type(error).__name__}: {error} (a bug: run again with --debug for the traceback)", 1
    print(f"gnomon: {message}", file=sys.stderr)
    return code
