"""Each folder here holds the tests of a package of sidcli; tests of whole programs and of single modules are beside the folders."""

from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
