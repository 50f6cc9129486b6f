"""The walls of the house: imports point downward, heavy libraries stay in their rooms, no loader can run code."""

import ast
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.checks import CHECKS

PACKAGE = REPOSITORY / "sidcli"
FLOORS = [
    {"errors", "numeric", "optimizer", "printable", "progress", "randomness", "diffusion"},
    {"devices", "environment", "files", "objectives"},
    {"distributed", "models"},
    {"formats", "settings"},
    {"emoji"},
    {"metrics"},
    {"curation", "data", "report"},
    {"engine", "evaluation"},
    {"training"},
    {"api"},
    {"cli"},
]
"""Rooms, which are packages and single modules, from the ground up."""
FORBIDDEN = {"eval", "exec", "compile", "__import__"}


def modules() -> dict[str, ast.Module]:
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name: ast.parse(path.read_text()) for path, name in names.items() if not name.endswith("__init__")}


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    everything = modules()
    return {
        name: {other.removeprefix("sidcli.") for other in imported(tree)} & set(everything) for name, tree in everything.items()
    }


def test_every_room_has_a_floor_and_imports_only_from_floors_below() -> None:
    assert len(FLOORS) <= 11
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    found = imports()
    assert {name.split(".")[0] for name in found} - {"__main__"} == set(floor)
    for name, others in found.items():
        for other in others:
            one, below = name.split(".")[0], other.split(".")[0]
            assert one == below or one == "__main__" or floor[below] < floor[one], f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    found, finished = imports(), set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in finished:
            for other in found[name]:
                visit(other, [*path, name])
            finished.add(name)

    for name in found:
        visit(name, [])


def test_the_classes_of_denoisers_are_named_where_models_are_read_and_made() -> None:
    for name in modules():
        text = (PACKAGE / f"{name.replace('.', '/')}.py").read_text()
        assert "UNet2DConditionModel" not in text or name.split(".")[0] in ("models", "emoji"), name
        for start, module in (
            ("SD3", "sd3"),
            ("PixArtTransformer", "pixart"),
            ("FluxTransformer", "flux"),
            ("SanaTransformer", "sana"),
        ):
            assert start not in text or name in (f"models.{module}", "models.kinds", "emoji.models"), name


def test_rich_and_typer_stay_in_their_rooms_and_click_nowhere() -> None:
    for name, tree in modules().items():
        roots = {module.split(".")[0] for module in imported(tree)}
        assert "click" not in roots
        assert "rich" not in roots or name == "cli.console"
        assert "typer" not in roots or name.startswith("cli.")


def test_no_function_is_longer_than_60_lines_and_the_training_step_than_40() -> None:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                most = 40 if node.name in ("train_step", "run_phase") else 60
                first = node.body[0]
                is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
                assert (node.end_lineno or 0) - node.lineno - docstring < most, f"{name}.{node.name}"


def test_environment_variables_are_read_in_one_module() -> None:
    hand_on = {"training.launch", "models.official_pkl"}  # to processes of their own
    for name, tree in modules().items():
        reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")]
        assert not reads or name == "environment" or name in hand_on, name


@pytest.mark.check(22)
def test_nothing_in_the_source_can_load_code_from_a_file() -> None:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                text = ast.unparse(node.func)
                assert text not in FORBIDDEN, f"{name}: {text}"
                assert text not in {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "os.system"}, f"{name}: {text}"
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert "trust_remote_code" not in keywords and "custom_pipeline" not in keywords
                assert keywords.get("shell") != "True"
                if text == "np.load":
                    assert keywords.get("allow_pickle") == "False"


def test_each_of_the_32_checks_has_a_test() -> None:
    numbers = set()
    for file in (REPOSITORY / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.check":
                numbers |= {ast.literal_eval(argument) for argument in node.args}
    assert numbers == set(range(1, len(CHECKS) + 1)) and len(CHECKS) == 32


def test_folders_of_tests_are_named_after_packages() -> None:
    folders = {file.parent.relative_to(REPOSITORY / "tests") for file in (REPOSITORY / "tests").rglob("test_*.py")} - {Path(".")}
    packages = {file.parent.relative_to(PACKAGE) for file in PACKAGE.rglob("__init__.py")} - {Path(".")}
    assert folders == packages
