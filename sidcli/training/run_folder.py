"""The run folder: its records (config.toml, run.json, metrics.jsonl, the card of the student) and how a run continues in it.

runs/NAME/  config.toml  run.json  metrics.jsonl  report.html  samples/  checkpoints/  student/
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError

from sidcli import __version__
from sidcli.data.latents import TEACHER_IMAGES
from sidcli.data.pairs import folder_of
from sidcli.data.prompts import Prompts
from sidcli.devices import cores, processor
from sidcli.engine import Engine
from sidcli.errors import InputError, UsageError
from sidcli.files import atomic_file, clear_leftovers, read_json, write_json
from sidcli.formats.card import provenance
from sidcli.models.loading import Model
from sidcli.progress import RunListener, counted
from sidcli.settings import TEACHER_DRAWS, DistillConfig, change, differences
from sidcli.training import checkpoint, precision
from sidcli.training.intervals import Intervals

RUN_FORMAT = 1


def find_checkpoint(
    output: Path, resume: Path | None, config: DistillConfig, inputs: dict[str, str], listener: RunListener
) -> checkpoint.Checkpoint | None:
    """Return the checkpoint `resume`, or the run's newest valid checkpoint, or None for a new run.

    Raises InputError if its settings or inputs do not agree, UsageError if it is beyond config.steps. `inputs` may lack the data,
    which take long to prepare; `restore` compares them.
    """
    if (output / "run.json").exists():
        record = read_json(output / "run.json", precision.RECORD_HINT)
        if record.get("format") != RUN_FORMAT:
            raise checkpoint.UnknownFormat(
                f"{output} is a run folder of format {record.get('format')}; this version of sid has format {RUN_FORMAT}",
                f"continue with the sid that wrote it ({record.get('sid')}), or choose another --output for a new run",
            )
    if resume:
        found = checkpoint.verify(resume)
    else:
        latest, problems = checkpoint.latest(output / "checkpoints")
        for problem in problems:
            listener.note(f"skipped: {problem}")
        if latest is None and (output / "student").exists():
            raise InputError(
                f"{output} holds a student, but no checkpoint that its training can continue from",
                f"choose another --output for a new run; the student is complete: sid sample --model {output}",
            )
        if latest is None:
            return None
        found = latest
    if found.step > config.steps:
        raise UsageError(
            f"{found.folder} is beyond --steps {config.steps}",
            "more steps, an older checkpoint with --resume, or another --output",
        )
    has_images = compares_images(found.config, config) or config.objective.draws_pairs
    changed = differences(found.config, config, {*inputs, "data"} if has_images else inputs)
    check_agreement(found, changed, inputs, config.references)
    return found


def compares_images(saved: Mapping[str, Any], config: DistillConfig) -> bool:
    """Return whether the images of a continued run are compared by content. Another number of images of the teacher is known to
    differ before they are drawn."""
    before, now = (
        values.get("data_num") or TEACHER_IMAGES if values.get("data") == TEACHER_DRAWS else 0
        for values in (saved, dataclasses.asdict(config))
    )
    return bool(config.data) and before == now


def check_agreement(found: checkpoint.Checkpoint, changed: list[str], inputs: dict[str, str], references: str) -> None:
    """Raises InputError if settings `changed`, or if the contents of an input did. `references` is the present value of --references."""
    before = found.config.get("references", "")
    for name in inputs:
        if found.inputs.get(name) != inputs[name]:
            is_other = name == "references" and before != references
            changed = [*changed, change(name, before, references) if is_other else f"{name}: contents changed"]
    if changed:
        raise InputError(
            f"{found.folder} was made with other settings: {'; '.join(changed)}", "choose another --output for a new run"
        )


def restore(engine: Engine, found: checkpoint.Checkpoint, inputs: dict[str, str], listener: RunListener) -> None:
    """Load a checkpoint. Writes nothing. Raises InputError if an input changed or the state does not fit the networks."""
    check_agreement(found, [], inputs, engine.config.references)
    try:
        engine.load(found.step, checkpoint.read(found))
    except (KeyError, RuntimeError, SafetensorError) as error:  # the hashes are valid, but the state is not of this run
        raise InputError(
            f"{found.folder} holds no state of this run: {type(error).__name__} {error}", "continue from another checkpoint"
        ) from error
    listener.note(f"continuing from step {found.step}")


def prepare_folder(engine: Engine, output: Path, intervals: Intervals, listener: RunListener) -> None:
    """Prepare the run folder to continue at the engine's step: remove later records and rename later checkpoints.

    Raises EnvironmentProblem if the disk lacks space for the checkpoints that follow.
    """
    checkpoints = output / "checkpoints"
    clear_leftovers(output)
    drop_records_after(output / "metrics.jsonl", engine.step, is_measured(engine.step, intervals, engine.config))
    for folder in checkpoint.set_aside(checkpoints, engine.step):
        listener.note(f"set aside: {folder}; delete it if you do not need it")
    if engine.step < engine.config.steps:
        checkpoint.check_room(checkpoints, engine.state_bytes, intervals.checkpoints)


def is_measured(step: int, intervals: Intervals, config: DistillConfig) -> bool:
    """Return whether --eval-every measures the student of a step."""
    return bool(intervals.eval) and (step % intervals.eval == 0 or step == config.steps)


def drop_records_after(metrics: Path, step: int, evaluates: bool) -> None:
    """Remove the lines of metrics.jsonl for steps that will be repeated, and lines that a crash truncated.

    With `evaluates`, also remove the proxy metrics of `step`, which are measured again before the next step.
    """
    if metrics.exists():
        kept = []
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if record["step"] < step or (record["step"] == step and not (evaluates and "proxy_clip" in record)):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        with atomic_file(metrics) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def now() -> str:
    """Return the current date and time in UTC as in ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def trained_seconds(metrics: Path) -> float:
    """Return the training time in seconds at the last record of metrics.jsonl; 0 if no record has it."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    found = [json.loads(line).get("seconds") for line in lines]
    return max((seconds for seconds in found if isinstance(seconds, float)), default=0.0)


def complete_record(output: Path, done: dict[str, int], seconds: float, student: int, reason: str) -> None:
    """Add to run.json: time of completion, steps and training images per network, seconds of training, the step of the student and
    the reason for it."""
    file = output / "run.json"
    record = read_json(file)
    record |= done | {"seconds": round(seconds, 1), "student": {"step": student, "reason": reason}}
    write_json(file, record | {"finished": record["finished"] or now()})


def write_record(
    output: Path,
    teacher: Model,
    config: DistillConfig,
    engine: Engine,
    prompts: Prompts,
    command: str,
    seconds_per_image: dict[str, float],
) -> None:
    """Write config.toml, which repeats the run with `--config`, and run.json: start time, hardware, versions, command and the
    arithmetic with the measurements that chose it.

    The run.json of a finished run without remaining steps is not changed.
    """
    file = output / "run.json"
    before = read_json(file) if engine.step and file.exists() else {}
    with atomic_file(output / "config.toml") as temporary:
        temporary.write_text(tomli_w.dumps(dataclasses.asdict(config)), encoding="utf-8")
    if engine.step == config.steps and before.get("finished"):
        return
    libraries = ("torch", "diffusers", "transformers")
    write_json(
        file,
        {
            "format": RUN_FORMAT,
            "sid": __version__,
            "started": before.get("started") or now(),
            "finished": None,
            "command": command,
            "versions": {name: version(name) for name in libraries} | {"python": platform.python_version()},
            "teacher": provenance(teacher),
            "prompts": {"name": prompts.name, "digest": prompts.digest},
            **data_entry(engine),
            **drawn_references(engine),
            "device": str(engine.device),
            "hardware": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else processor(),
            "processor": processor(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "processes": engine.distributed.count,
            "bf16": engine.arithmetic.bf16,
            "attention": engine.arithmetic.attention,
            "seconds_per_image": seconds_per_image,
        },
    )


def data_entry(engine: Engine) -> dict[str, Any]:
    """Return the entry `data` of run.json: name, number and digest of the images, and the folder of the pairs of another run, from which
    a student of this run trains too; without images, an empty dict."""
    if (data := engine.data) is None:
        return {}
    pairs = folder_of(engine.config.data)
    entry: dict[str, Any] = {"name": data.name, "images": len(data), "digest": data.digest}
    return {"data": entry | ({"pairs": str(pairs.resolve())} if pairs else {})}


def drawn_references(engine: Engine) -> dict[str, Any]:
    """Return the entry `references` of run.json and sid.json, with the origin, license and fingerprint of the student that draws the
    reference images; without one, an empty dict."""
    if engine.references is None:
        return {}
    return {"references": provenance(engine.references.sampler.model) | {"fingerprint": engine.references.fingerprint}}


def student_card(engine: Engine, prompts: Prompts, started_from: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the content of the student's sid.json: how it samples, how it was made, and the models of --init."""
    config = engine.config
    card = {
        "kind": engine.objective.makes,
        "method": engine.objective.method,
        **engine.sampling,
        "teacher": provenance(engine.sampler.model),
        "steps_trained": engine.step,
        "images": engine.images,
        "prompts": prompts.name,
        "config": dataclasses.asdict(config),
        "sid": __version__,
    }
    world = engine.sampler.model.card.get("world")
    data = {"data": f"{counted(len(engine.data), 'image')} of {engine.data.name}"} if engine.data else {}
    init = {"init": list(started_from)} if started_from else {}
    return card | data | drawn_references(engine) | init | ({"world": world} if world else {})
