"""`sid export`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidcli.cli.common import describe_model, load_model, open_console
from sidcli.cli.options import ConfigOption, JsonOption, PredictionOption, QuietOption, one_of, within
from sidcli.errors import UsageError
from sidcli.formats.order import DTYPES, FORMATS
from sidcli.formats.outputs import check_export

if TYPE_CHECKING:
    from sidcli.cli.console import Console
    from sidcli.formats.export import Exported
    from sidcli.formats.order import Order
    from sidcli.models.loading import Description
    from sidcli.models.loading import Model as Student

Model = Annotated[
    str,
    typer.Argument(autocompletion=one_of("emoji"), help="A run folder, a student folder or file, emoji, or the authors' FILE.pkl."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Format = Annotated[
    str,
    typer.Option("--format", autocompletion=one_of(*FORMATS), help="diffusers, single-file, onnx, openvino, torch-export or lora."),
]
Dtype = Annotated[str, typer.Option(autocompletion=one_of(*DTYPES), help="fp32, fp16 or bf16.")]
Variant = Annotated[
    str | None, typer.Option(autocompletion=one_of("fp16"), help="Variant in the names of diffusers' weight files: fp16.")
]
Teacher = Annotated[str | None, typer.Option(show_default="the student's own", help="The model that a LoRA or a .pkl belongs to.")]
Rank = Annotated[
    int | None,
    typer.Option(callback=within(1, 1024), show_default="64; that of --student-lora if it was used", help="LoRA rank."),
]
Verify = Annotated[bool, typer.Option(help="Draw with the export and compare before the folder appears.")]
PushToHub = Annotated[str | None, typer.Option(help="Upload to this repository, OWNER/NAME.")]
Public = Annotated[bool, typer.Option(help="Create the repository as public; default: private.")]
License = Annotated[str | None, typer.Option(help="License of the teacher, such as openrail++, where its files do not say.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a folder that is there.")]


def export(
    model: Model,
    output: Output,
    format: Format = "diffusers",
    dtype: Dtype = "fp32",
    variant: Variant = None,
    teacher: Teacher = None,
    rank: Rank = None,
    verify: Verify = True,
    push_to_hub: PushToHub = None,
    public: Public = False,
    license: License = None,
    prediction_type: PredictionOption = "auto",
    model_config: ConfigOption = "",
    overwrite: Overwrite = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a student for other programs.

    Example: sid export runs/emoji-teacher-g2 --format diffusers -o cat-drawer
    """
    is_pickle = Path(model).suffix.lower() == ".pkl"
    if is_pickle and teacher is None:
        raise UsageError("a .pkl holds a UNet alone", "--teacher ID: the model that it was distilled from")
    if push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", push_to_hub):
        raise UsageError(f"--push-to-hub must be OWNER/NAME, not {push_to_hub!r}")
    from sidcli.formats.order import DEFAULT_RANK, Order, check

    order = Order(dtype, variant, rank or DEFAULT_RANK)
    check(format, order)
    output = Path(os.path.abspath(output)) if output.name in ("", "..") else output
    check_export(output, overwrite)
    stopped, smaller = ("nothing half-written is left", "the same command again"), "free some memory, or pass --no-verify"
    with open_console(as_json, quiet, stopped, smaller, () if format == "lora" else ("bitsandbytes", "peft")) as console:
        known = {"prediction_type": prediction_type, "model_config": model_config}
        asked = Asked(model, teacher, known, format, order, rank, license, push_to_hub)
        student, order = asked.load(output, console)
        from sidcli.formats import export as driver

        with console.progress(f"export {format}", 3, "stages") as advance:
            done = driver.run(student, format, output, order, verify, advance)
        tell(done, console, push_to_hub, public)


@dataclass(frozen=True)
class Asked:
    """Which models an export needs, and as what it is written."""

    model: str
    teacher: str | None
    known: dict[str, Any]
    """What the options say about the model, or about the teacher of a .pkl."""
    format: str
    order: Order
    rank: int | None
    license: str | None
    push_to_hub: str | None

    def load(self, output: Path, console: Console) -> tuple[Student, Order]:
        """The student, checked before a weight is read, and the order with the teacher of a LoRA."""
        from sidcli.formats import export as driver

        if Path(self.model).suffix.lower() == ".pkl":
            student, order = self.load_released(output, console)
        elif self.format == "lora":
            student, order = self.load_with_teacher(output, console)
        else:
            self.check(describe_model(self.model, **self.known), None, self.order, output)
            student, order = load_model(self.model, console, **self.known), self.order
        return driver.licensed(student, self.license, needed=self.push_to_hub is not None), order

    def check(self, described: Description, teacher: Description | None, order: Order, output: Path) -> None:
        from sidcli.formats import export as driver

        driver.check(described, teacher, self.format, order, output)
        driver.licensed(described, self.license, needed=self.push_to_hub is not None)
        if self.push_to_hub:
            driver.check_upload(self.push_to_hub)

    def load_released(self, output: Path, console: Console) -> tuple[Student, Order]:
        """A student from one of the authors' files, which holds a UNet alone."""
        from sidcli.formats import export as driver

        teacher = str(self.teacher)
        base = describe_model(teacher, **self.known)
        described = driver.released(Path(self.model), base)
        self.check(described, base if self.format == "lora" else None, self.order, output)
        console.note(f"reading {self.model} in a separate process")
        weights = driver.weights_of(Path(self.model), described)
        loaded = load_model(teacher, console, **self.known)
        student = driver.imported(described, Path(self.model), weights, loaded)
        return student, replace(self.order, teacher=loaded if self.format == "lora" else None)

    def load_with_teacher(self, output: Path, console: Console) -> tuple[Student, Order]:
        """A student and its teacher, for a LoRA of the rank that is asked for, or that the student was trained with."""
        from sidcli.formats import export as driver
        from sidcli.formats.order import DEFAULT_RANK, Order

        of_teacher = self.known if self.teacher and self.teacher.endswith(".safetensors") else {}
        of_student = {} if of_teacher else self.known
        described = describe_model(self.model, **of_student)
        recorded = described.card.get("config", {})
        again = {name: recorded[name] for name in self.known if name in recorded}
        teacher, known = (self.teacher, of_teacher) if self.teacher else (driver.teacher_of(described), again)
        order = Order(self.order.dtype, self.order.variant, self.rank or driver.trained_rank(described.card) or DEFAULT_RANK)
        self.check(described, describe_model(teacher, **known), order, output)
        base = load_model(teacher, console, **known)
        return load_model(self.model, console, **of_student), replace(order, teacher=base)


def tell(done: Exported, console: Console, push_to_hub: str | None, public: bool) -> None:
    """What was written, after it was uploaded if that is asked for."""
    if done.difference is not None:
        console.note(f"verified: the export draws the same image as sid, at most {done.difference}/255 apart")
    if done.loss is not None:
        console.note(f"the LoRA's image is at most {done.loss}/255 from the student's own; a higher --rank keeps more")
    if push_to_hub:
        from sidcli.models.hub import upload

        url = upload(done.folder, push_to_hub, not public, console)
        console.note(f"uploaded to {url} ({'public' if public else 'private, if it was made now'})")
    data = {"folder": str(done.folder), "files": done.files, "difference_255": done.difference, "lora_loss_255": done.loss}
    console.result([str(done.folder)], data)
