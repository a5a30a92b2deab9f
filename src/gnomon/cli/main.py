"""The command `gnomon`: finds the subcommand, loads only its file, turns errors into sentences and exit codes.

Exit codes: 0 ok, 1 failure, 2 usage, 3 blocked by a guard, 130 interrupted. No traceback without --debug.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

import click
import typer.core
import typer.main

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("gnomon.cli.serve", "Serve models over an OpenAI-compatible API, with the studio page."),
    "chat": ("gnomon.cli.chat", "Talk to a model in the terminal."),
    "generate": ("gnomon.cli.generate", "Continue a prompt."),
    "embed": ("gnomon.cli.embed", "Turn texts into vectors."),
    "score": ("gnomon.cli.score", "How likely is a continuation?"),
    "pull": ("gnomon.cli.pull", "Fetch a model of the zoo into the cache."),
    "ls": ("gnomon.cli.ls", "List models."),
    "show": ("gnomon.cli.show", "What a model reference is: network, tensors, identity, licence."),
    "rm": ("gnomon.cli.rm", "Remove a fetched model."),
    "ps": ("gnomon.cli.ps", "What a running server serves."),
    "config": ("gnomon.cli.config", "Settings: where they come from, and the recipe's schema."),
    "doctor": ("gnomon.cli.doctor", "What this machine and installation can do."),
    "completion": ("gnomon.cli.completion", "Shell completion for bash, zsh or fish."),
    "version": ("gnomon.cli.version", "The version."),
}


class LazyGroup(typer.core.TyperGroup):
    """Subcommands are imported when they run, so that --help stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(set(_capability_commands()) - set(COMMANDS))]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            return _load(f"{COMMANDS[name][0]}:app", name)
        found = _capability_commands().get(name)
        return _load(found[0], name) if found else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, text) for name, (_, text) in COMMANDS.items()]
        rows += [(name, text) for name, (_, text) in sorted(_capability_commands().items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from gnomon.capability import nearest

            raise click.UsageError(f"No such command `{args[0]}`. {nearest(args[0], self.list_commands(ctx))}", ctx) from None


def _capability_commands() -> dict[str, tuple[str, str]]:
    """Commands that installed capabilities bring: name -> (import string, help)."""
    from gnomon.capability import Registry

    found = Registry.installed().capabilities.values()
    return {capability.name: (capability.commands, capability.help) for capability in found if capability.commands}


def _load(path: str, name: str) -> click.Command:
    module, _, attribute = path.partition(":")
    app = getattr(importlib.import_module(module), attribute)
    command: click.Command = app if isinstance(app, click.Command) else typer.main.get_command(app)
    command.name = name
    return command


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Improve open-weight language models at every seam between weights and text.\n\n"
    "Begin with `gnomon chat`, or `gnomon serve` and open the address it prints.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars, no notes.")
@click.version_option(package_name="gnomon", prog_name="gnomon")
def cli(debug: bool, quiet: bool) -> None:
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
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        result = cli.main(args=arguments, prog_name="gnomon", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        error.show()
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
