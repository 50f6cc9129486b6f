"""How fast a student draws on this CPU with each backend, beside torch: the whole way from prompts to images.

    python tests/benchmarks/backends.py            (needs the extras onnx and openvino)

Writes tests/benchmarks/results/backends.json and prints the table of the README.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path

import torch

from sidcli.files import write_json
from sidcli.formats.export import PROMPT, apart
from sidcli.formats.order import Order
from sidcli.formats.runtime import open_graphs
from sidcli.models.drawing import Drawer, Plan
from sidcli.models.loading import load, quiet_libraries
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find

RESULT = Path(__file__).parent / "results" / "backends.json"


def seconds_per_image(drawer: Drawer, plan: Plan, batch: int, repeats: int) -> float:
    """The fastest of `repeats` batches, after one that warms up."""
    prompts, seeds = [PROMPT] * batch, list(range(batch))
    drawer.images(prompts, seeds, plan)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        drawer.images(prompts, seeds, plan)
        times.append(time.perf_counter() - started)
    return min(times) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    quiet_libraries()
    model = load(find(given.model))
    plan = plan_for(model)
    ours = Sampler(model, torch.device("cpu"))
    drawers: dict[str, Drawer] = {"torch": ours}
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("onnx", "openvino"):
            folder = Path(temporary) / name
            folder.mkdir()
            importlib.import_module(f"sidcli.formats.{name}").write(folder, model, Order())
            drawers[name] = open_graphs(folder, name)
        reference = ours.images([PROMPT], [0], plan)[0]
        rows = []
        for name, drawer in drawers.items():
            different = apart(drawer.images([PROMPT], [0], plan)[0], reference)
            row: dict[str, object] = {"backend": name, "difference_255": different}
            for batch in (1, 16):
                row[f"seconds_per_image_batch_{batch}"] = round(seconds_per_image(drawer, plan, batch, given.repeats), 5)
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_json(RESULT, {"model": given.model, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows})
    base = [float(str(rows[0][f"seconds_per_image_batch_{batch}"])) for batch in (1, 16)]
    print("\n| backend | ms an image, one at a time | x | ms an image, batch 16 | x | difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        one, many = (float(str(row[f"seconds_per_image_batch_{batch}"])) for batch in (1, 16))
        cells = [
            f"{one * 1e3:.1f}",
            f"{base[0] / one:.2f}",
            f"{many * 1e3:.1f}",
            f"{base[1] / many:.2f}",
            f"{row['difference_255']}/255",
        ]
        print(f"| {row['backend']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
