"""The command line: one file per command, and what they share."""

from sidcli.cli.application import app, main

__all__ = ["app", "main"]
