"""README, docs and examples: commands that parse, links that lead somewhere, scripts that run."""

import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path
from string import Template

import pytest
import typer

from sidcli.cli import app
from tests import REPOSITORY
from tests.commands import from_server as sid

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The `sid` commands of a page, in blocks and in running text; not those with an ellipsis."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```(?:bash|console)\n(.*?)^```", text, flags=re.S | re.M)).replace("\\\n", " ")
    lines = [line.removeprefix("$ ").split("  #")[0] for line in blocks.splitlines()]
    inline = [match.replace("\n", " ") for match in re.findall(r"`(sid (?:distill|sample|eval|export) [^`]+)`", text)]
    found = [line for line in lines if line.startswith("sid ")] + inline
    return [command for command in found if "..." not in command]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_has_the_arguments_of_its_command(page: Path) -> None:
    application = typer.main.get_command(app)
    for text in commands(page):
        _, name, *arguments = shlex.split(text, comments=True)
        command = application.commands[name]  # type: ignore[attr-defined]
        try:
            with suppress(typer.Exit):  # --help
                command.make_context(name, list(arguments))
        except typer.TyperException as error:
            raise AssertionError(f"{text}: {error.format_message()}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), f"{page.name}: {target}"
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in headings], target


def test_the_readme_has_at_most_160_lines() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


@pytest.mark.usefixtures("small_batch")
def test_the_commands_of_the_script_for_continuous_integration_run_in_their_order(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "ci.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("sid ")]
    assert len(lines) == 4
    for line in lines:
        words = Template(line.split(">")[0]).substitute(STEPS="1", NUM="10", CLIP="-1")
        done = sid(*shlex.split(words)[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {"cat.png", "run", "student"} <= {path.name for path in tmp_path.iterdir()}


def test_the_slurm_script_is_bash_and_its_training_has_the_options_of_sid() -> None:
    script = REPOSITORY / "examples" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    (line,) = re.findall(r"-m sidcli distill ([^']+)'", script.read_text(encoding="utf-8"))
    typer.main.get_command(app).commands["distill"].make_context("distill", shlex.split(line))  # type: ignore[attr-defined]


def test_the_script_of_a_subject_is_bash_and_its_commands_have_the_options_of_sid() -> None:
    script = REPOSITORY / "examples" / "subject.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("sid ")]
    assert len(lines) == 4
    for line in lines:
        _, name, *words = shlex.split(Template(line).substitute(SHEETS="1", STEPS="1", NUM="10"))
        typer.main.get_command(app).commands[name].make_context(name, words)  # type: ignore[attr-defined]
