"""Each folder here holds the tests of a package of sidcli; tests of whole programs and of single modules are beside the folders."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

# diffusers and peft import bitsandbytes if it is installed, which takes seconds. Tests that need it import it themselves.
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
import diffusers.quantizers  # noqa: E402, F401
import peft  # noqa: E402, F401

del sys.modules["bitsandbytes"]
