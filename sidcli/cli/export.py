"""`sid export`."""

from __future__ import annotations

from typing import Annotated

import typer

from sidcli import api
from sidcli.cli.common import open_console
from sidcli.cli.options import ConfigOption, JsonOption, PredictionOption, QuietOption, one_of, within
from sidcli.formats.order import DTYPES, FORMATS

Model = Annotated[
    str,
    typer.Argument(autocompletion=one_of("emoji"), help="A run folder, a student folder or file, emoji, or the authors' FILE.pkl."),
]
Output = Annotated[str, typer.Option("--output", "-o", help="Folder to write.")]
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
    stopped, smaller = ("nothing half-written is left", "the same command again"), "free some memory, or pass --no-verify"
    with open_console(
        as_json, quiet, stopped, smaller, ("bitsandbytes",) if format == "lora" else ("bitsandbytes", "peft")
    ) as console:
        done = api.export(
            model,
            output,
            format,
            dtype=dtype,
            variant=variant,
            teacher=teacher,
            rank=rank,
            verify=verify,
            license=license,
            push_to_hub=push_to_hub,
            public=public,
            prediction_type=prediction_type,
            model_config=model_config,
            overwrite=overwrite,
            listener=console,
        )
        data = {"folder": str(done.folder), "files": done.files, "difference_255": done.difference, "lora_loss_255": done.loss}
        console.result([str(done.folder)], data)
