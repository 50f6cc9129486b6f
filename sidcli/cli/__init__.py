"""The command line: one module per command, and the modules that they share."""

from sidcli.cli.application import app, main

__all__ = ["app", "main"]
