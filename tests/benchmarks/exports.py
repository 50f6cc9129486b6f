"""Tiny random SD 1, SD 2 (v) and SDXL pipelines: folder -> single file -> teacher -> two steps of distillation -> every format, and
how far the image that each format's own library draws is from `sid sample`'s.

    python -m tests.benchmarks.exports             (needs the extras lora, onnx and openvino)

Writes tests/benchmarks/results/exports.json and prints the table of the README.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from sidcli.files import write_json
from sidcli.formats import export
from sidcli.formats.order import Order
from sidcli.models.loading import quiet_libraries
from sidcli.settings import DistillConfig
from tests.formats.test_export import FAMILIES, student_of, through_a_single_file

RESULT = Path(__file__).parent / "results" / "exports.json"


def main() -> None:
    config = DistillConfig(batch_size=2, micro_batch=2, lr_fake=1e-3, lr_generator=1e-3, precision="fp32", prompts="general")
    quiet_libraries()
    rows: list[dict[str, object]] = []
    print(f"| family | {' | '.join(export.FORMATS)} |\n| --- |{' ---: |' * len(export.FORMATS)}")
    for family, write in FAMILIES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            teacher = through_a_single_file(write(folder / "teacher"), folder / "teacher.safetensors")
            student = student_of(folder, config, teacher.source.name)
            cells = []
            for form in export.FORMATS:
                started = time.monotonic()
                order = Order(teacher=teacher if form == "lora" else None)
                done = export.run(student, form, folder / form, order, True, lambda count: None)
                seconds = round(time.monotonic() - started, 1)
                rows.append({"family": family, "format": form, "difference_255": done.difference, "seconds": seconds})
                cells.append(f"{done.difference}/255")
        print(f"| {family} | {' | '.join(cells)} |", flush=True)
    write_json(RESULT, {"rows": rows})


if __name__ == "__main__":
    main()
