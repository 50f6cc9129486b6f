"""The application: four commands, and errors as one line with their exit code.

A command reads options, makes a config, calls one function and prints one result. Large libraries are imported only after the
options are validated.
"""

from __future__ import annotations

import errno
import gc
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from sidcli import __version__
from sidcli.cli.distill import distill
from sidcli.cli.evaluate import evaluate
from sidcli.cli.export import export
from sidcli.cli.sample import sample
from sidcli.environment import flag, group_or_alone, prepare
from sidcli.errors import EnvironmentProblem, SidError, UsageError
from sidcli.printable import prepare_streams, printable
from sidcli.training.launch import install_handlers

EPILOG = (
    "Exit codes: 0 ok, 1 the run failed, 2 usage, 3 model or prompts refused or not found, "
    "4 device, memory, disk or folder, 5 a verification failed, 129, 130, 138 or 143 stopped by a signal, a training after saving."
)
PATHS = ("--reference", "--prompts", "--config", "--resume", "--inception", "--report", "--picture")
"""Options whose value is a path that must not be empty."""
app = typer.Typer(
    name="sid",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sid {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a text-to-image diffusion model into one that draws in a single step."""


app.command()(distill)
app.command()(sample)
app.command(name="eval")(evaluate)
app.command()(export)


def _is_text(prompt: str) -> bool:
    """Return whether an argument is valid UTF-8. Python decodes invalid bytes from the shell as surrogates."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_paths(arguments: Sequence[str]) -> None:
    """Raises UsageError for an option of PATHS with an empty value, which the parser would read as the current folder."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in PATHS and ([value] if equals else list(arguments[place + 1 : place + 2])) == [""]:
            raise UsageError(f"{option} must be a path, not ''", f"{option} PATH, or leave it out")


def _stop(number: int, frame: FrameType | None) -> None:
    """Exit on a signal through SystemExit, so that no partial file stays. A training run has its own handler, which saves first."""
    sys.exit(128 + number)


def main() -> None:
    """Entry point of `sid`.

    A SidError or an option error prints one line and sets its exit code; other errors print a traceback and exit with 1.
    """
    # The imports of a command create half a million objects that live until its end. Collecting garbage among them takes a second.
    gc.set_threshold(50_000, 20, 20)
    install_handlers(_stop)
    prepare_streams()
    prepare()
    try:
        for argument in sys.argv[1:]:
            if not _is_text(argument):
                raise UsageError(f"{argument!r} is not valid UTF-8", "check the encoding of your terminal or script")
        _check_paths(sys.argv[1:])
        sys.exit(app(prog_name="sid", standalone_mode=False))
    except typer.TyperException as error:
        if message := error.format_message():  # empty for `sid` without arguments, which prints its help
            message = message.replace("Value error, ", "")  # a prefix of pydantic, which checks the types of options
            _say(UsageError(message, f"{getattr(getattr(error, 'ctx', None), 'command_path', 'sid')} --help"))
        sys.exit(error.exit_code)
    except SidError as error:
        if flag("SID_DEBUG"):
            _show_traceback()
        # Most errors occur in all processes for the same reason, so local rank 0 prints them. Memory and disk errors can occur in
        # one process.
        # one process.
        if group_or_alone().local_rank == 0 or isinstance(error, EnvironmentProblem):
            _say(error)
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of help texts, for example, that stdout does not take
            _say(EnvironmentProblem("a file or stdout could not be written: no space left on the disk", "make room"))
            sys.exit(EnvironmentProblem.exit_code)
        _show_traceback()
        if _json_asked():
            _say(SidError(f"unexpected {type(error).__name__}: {error}", "report it, with the traceback above"))
        sys.exit(1)


def _json_asked() -> bool:
    """Return whether --json is among the arguments, even if these cannot be parsed."""
    arguments = sys.argv[1:]
    return "--json" in arguments[: arguments.index("--")] if "--" in arguments else "--json" in arguments


def _say(error: SidError) -> None:
    from sidcli.cli.console import Console

    Console(as_json=_json_asked()).error(error)


def _show_traceback() -> None:
    """Print the traceback, with characters that could control a terminal as escapes and without the values of variables."""
    sys.stderr.write(printable(traceback.format_exc(), keep="\n"))
