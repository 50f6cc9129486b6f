"""The walls of the house: imports point downward, heavy libraries stay in their rooms, no loader can run code."""

import ast
from pathlib import Path

import pytest

from tests.checks import CHECKS

PACKAGE = Path(__file__).parent.parent / "sidcli"
FLOORS = [
    {
        "errors",
        "randomness",
        "optimizer",
        "__init__",
        "models.codec",
        "metrics.catalog",
        "png",
        "printable",
        "progress",
        "diffusion.path",
        "diffusion.guidance",
    },
    {"environment", "diffusion.sampling", "models.unet", "objectives.base"},
    {"files", "launch", "parallel", "objectives.scores"},
    {
        "devices",
        "hub",
        "formats.inert_pickle",
        "families",
        "compatibility",
        "formats.ldm",
        "formats.comfyui",
        "objectives.sid",
        "objectives.dmd2",
        "objectives.vsd",
        "emoji.nouns",
        "metrics.intervals",
    },
    {
        "wishes",
        "outputs",
        "sources",
        "vocabulary",
        "rehearsal",
        "imagefiles",
        "formats.official_pkl",
        "emoji.world",
        "emoji.sprites",
        "tables",
    },
    {"config", "formats.single_file"},
    {
        "prompts",
        "emoji.classifier",
        "emoji.clip",
        "emoji.models",
        "teachers",
        "pictures",
        "metrics.fid",
        "metrics.transforms",
        "metrics.kid",
        "metrics.prdc",
        "metrics.weights",
        "emoji.vocabulary",
    },
    {"sampler", "checkpoint", "metrics.features", "formats.order", "formats.card", "report.charts"},
    {"engine", "metrics.clip", "imagesets", "formats.diffusers_folder", "report.page"},
    {"formats.graph", "formats.lora", "formats.single_file_folder", "emoji.train", "emoji.pack", "report.run"},
    {"formats.runtime", "protocols"},
    {"formats.onnx", "formats.torch_export", "entrants", "proxy"},
    {"formats.openvino", "scores"},
    {"distill", "sample", "evaluate", "export", "plan"},
    {"cli.options", "cli.console"},
    {"cli.common"},
    {"cli.distill", "cli.sample", "cli.evaluate", "cli.export"},
    {"cli.application"},
    {"__main__"},
]
FORBIDDEN = {"eval", "exec", "compile", "__import__"}


def modules() -> dict[str, ast.Module]:
    names = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name: ast.parse(path.read_text()) for path, name in names.items() if not name.endswith(".__init__")}


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_floor_and_imports_only_from_floors_below() -> None:
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    everything = modules()
    assert set(everything) == set(floor)
    for name, tree in everything.items():
        own = {other.removeprefix("sidcli.") for other in imported(tree) if other.startswith("sidcli.")}
        for other in own & set(floor):
            assert floor[other] < floor[name], f"{name} imports {other}"


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
                assert (node.end_lineno or 0) - node.lineno < most, f"{name}.{node.name}"


def test_environment_variables_are_read_in_one_module() -> None:
    hand_on = {"launch", "formats.official_pkl"}  # to processes of their own
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
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.check":
                numbers |= {ast.literal_eval(argument) for argument in node.args}
    assert numbers == set(range(1, len(CHECKS) + 1)) and len(CHECKS) == 32
