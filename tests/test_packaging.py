"""What an installation holds, and what we tell people to install."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sidcli.formats.order import FORMATS
from tests import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel, where `pip install --target` would put them."""
    folder = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts}


def test_an_installation_has_every_file_of_the_package_and_the_prompts(installed: Path) -> None:
    wanted = {f"sidcli/{name}" for name in files(REPOSITORY / "sidcli")}
    assert files(installed) == wanted | {f"sidcli/prompt_lists/{name}" for name in files(REPOSITORY / "prompts")}


def test_an_installation_anywhere_finds_its_general_prompts(installed: Path, tmp_path: Path) -> None:
    program = "from sidcli.data import prompts; print(prompts.__file__, prompts.open_prompts('general').at(0, 5), sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, prompt = done.stdout.splitlines()
    assert Path(file).parent.parent == installed / "sidcli"
    from sidcli.data.prompts import open_prompts

    assert prompt == open_prompts("general").at(0, 5)


def test_the_distribution_refers_to_itself_by_its_name_and_hints_name_the_libraries_of_the_extras() -> None:
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    own = PROJECT["name"]
    assert own == "sid-distill"  # "sidcli" belongs to somebody else on the public index

    def libraries(extra: str) -> set[str]:
        found: set[str] = set()
        for requirement in extras[extra]:
            name, _, rest = requirement.partition("[")
            found |= {library for inner in rest.rstrip("]").split(",") for library in libraries(inner)} if name == own else {name}
        return {name.partition(">=")[0] for name in found}

    needed = {requirement.partition(">=")[0] for requirement in PROJECT["dependencies"]}
    for name, form in FORMATS.items():
        assert set(form.packages) <= (libraries(name) if name in extras else needed), name
    assert libraries("dev") >= {"bitsandbytes", "openvino", "onnx", "setuptools"}
    sources = [*(REPOSITORY / "sidcli").rglob("*.py"), REPOSITORY / "README.md", REPOSITORY / "Makefile"]
    assert not [file.name for file in sources if re.search(r"sidcli\[|pip install \W*sid", file.read_text(encoding="utf-8"))]
