"""`sid distill`: the training loop around the engine: train, log, evaluate, sample, save, stop."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil
import torch

from sidcli.data.captioned import CaptionedImages
from sidcli.data.latents import TEACHER_IMAGES, EncodedImages, Latents, Source, TeacherImages, prepare
from sidcli.data.pair_images import PairImages
from sidcli.data.pairs import folder_of
from sidcli.data.prompts import Prompts
from sidcli.devices import pick_device
from sidcli.distributed import count
from sidcli.engine import Engine, Measurements, check_teacher
from sidcli.errors import EnvironmentProblem, InputError, Interrupted, SidError, UsageError, out_of_memory
from sidcli.files import append_line, locked, write_json
from sidcli.formats.diffusers_folder import write_student
from sidcli.formats.outputs import check_run
from sidcli.models.drawing import NotFinite
from sidcli.models.loading import Model, with_texts_of_files
from sidcli.models.sampler import plan_for
from sidcli.models.sources import fingerprint
from sidcli.progress import RunListener, counted
from sidcli.report.decay import best, worsening
from sidcli.report.page import write
from sidcli.report.run import records, run_page
from sidcli.settings import DistillConfig
from sidcli.training import checkpoint, pairs, precision
from sidcli.training.initial import Initial
from sidcli.training.intervals import Intervals
from sidcli.training.launch import install_handlers, restore_handlers
from sidcli.training.proxy import DIVERSITY_IMAGES, PROXY_IMAGES, Proxy
from sidcli.training.references import open_references
from sidcli.training.run_folder import (
    complete_record,
    drop_records_after,
    find_checkpoint,
    is_measured,
    prepare_folder,
    restore,
    student_card,
    trained_seconds,
    write_record,
)
from sidcli.training.samples import GRID_IMAGES, Painter, prompts_for

SKIPPED_LIMIT = 3
"""Consecutive skipped updates of one network at which the run returns to a checkpoint."""


class Tracker(Protocol):
    """Interface of accelerate's trackers."""

    def log(self, values: dict[str, Any], step: int | None) -> None: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class Result:
    run: Path
    student: Path
    step: int
    taken: int
    """Steps of this command; 0 if the run was already finished."""
    images: int
    """Training images per network of the whole run."""
    seconds: float
    """Training time of this command."""
    saving: float
    """Part of `seconds` in which the training waited for checkpoints."""
    last: dict[str, Any]
    takes_reference: bool = False


class StopFlag:
    """Handler that stores a signal of STOPPING until the training loop reads it. A second signal ends the process.

    In an `at_once` context a signal raises Interrupted immediately.
    """

    def __init__(self) -> None:
        self.number = 0
        self.impatient = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            sys.exit(128 + number)
        self.number = number
        self.obey()

    def obey(self) -> None:
        if self.number and self.impatient:
            raise Interrupted(self.number, "interrupted before the first step", "run the same command again")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal raises Interrupted immediately, also a signal that arrived before the context."""
        self.impatient = True
        try:
            self.obey()
            yield
        finally:
            self.impatient = False

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        before = install_handlers(self)
        try:
            yield self
        finally:
            restore_handlers(before)


def run(
    teacher: Model,
    config: DistillConfig,
    prompts: Prompts,
    output: Path,
    device_name: str,
    intervals: Intervals,
    resume: Path | None,
    listener: RunListener,
    tracker: str | None = None,
    command: str = "",
    images: CaptionedImages | None = None,
    initial: Initial | None = None,
) -> Result:
    """Distill `teacher` into output/student, or continue the run in `output`. `command` is recorded in run.json.

    `images` are those of `config.data`, or None if there are none or the teacher draws them. `initial` is that of `config.init`.

    Raises InputError if the settings of a continued run changed or another version of sid wrote it, Interrupted on a signal after
    saving, EnvironmentProblem if the folder is in use or the disk is too small, SidError if the loss stops being finite or another
    process of the run has died.
    """
    check_run(output)
    check_teacher(teacher, config)
    with StopFlag().installed() as stop, advice(config):
        with stop.at_once():
            device = pick_device(device_name)
            before = resume.resolve().parent.parent if resume else output
            arithmetic, seconds_per_image = precision.choose(teacher, config, device, before / "run.json", listener)
            engine = Engine(teacher, config, prompts, device, arithmetic, initial.take() if initial else None)
            check_intervals(engine, intervals)
            check_references(engine)
            if config.references:
                engine.references = open_references(engine, listener)
        with locked(output) if engine.distributed.is_main else nullcontext():
            with stop.at_once():
                inputs = {"prompts": prompts.digest, "teacher": fingerprint(teacher.source)}
                inputs |= {"init": initial.digest} if initial else {}
                inputs |= {"references": engine.references.fingerprint} if engine.references else {}
                found = find_checkpoint(output, resume, config, inputs, listener)
                if config.data or config.objective.draws_pairs:
                    engine.data = open_data(engine, images, output, inputs["teacher"], listener)
                    inputs["data"] = engine.data.digest
                if found:
                    restore(engine, found, inputs, listener)
                engine.distributed.wait()
                if engine.distributed.is_main:
                    prepare_folder(engine, output, intervals, listener)
                    write_record(output, teacher, config, engine, prompts, command, seconds_per_image)
                engine.distributed.wait()
            began_at = engine.step
            for line in introduction(engine, output):
                listener.note(line)
            listener.started(began_at, config.steps)
            writer = checkpoint.Writer(output / "checkpoints", dataclasses.asdict(config), inputs, intervals.keep)
            with open_tracker(tracker if engine.distributed.is_main else None, output) as board:
                loop = Loop(engine, output, intervals, writer, stop, listener, board)
                seconds, record = loop.run()
            if cut := engine.sampler.truncated:
                listener.note(f"{cut} training prompts were longer than the text encoder reads and were truncated")
            step = engine.step
            write_results(loop, prompts, step, initial)
    student, shown = output / "student", step * config.batch_size
    return Result(output, student, step, step - began_at, shown, seconds, writer.seconds, record, bool(engine.layout))


def write_results(loop: Loop, prompts: Prompts, step: int, initial: Initial | None) -> None:
    """Write the student, complete the record of a run of `step` steps, and write the report."""
    engine, output = loop.engine, loop.output
    started_from, licenses = (initial.sources, initial.licenses) if initial else ((), ())
    reason = loop.return_to_best() if loop.intervals.keep_best else "the last step"
    student = engine.student()
    if engine.distributed.is_main:
        student = with_texts_of_files(student, engine.config.overrides)
        write_student(output / "student", student, student_card(engine, prompts, started_from), licenses=licenses)
        complete_record(output, {"steps": step, "images": step * engine.config.batch_size}, loop.trained, engine.step, reason)
        write(run_page(output), output / "report.html")
    engine.distributed.wait()


def check_intervals(engine: Engine, intervals: Intervals) -> None:
    """Raises UsageError if the student is to be measured during the training and takes a reference image."""
    if engine.layout and intervals.eval:
        raise UsageError(
            f"--eval-every {intervals.eval} does not measure models that take a reference image",
            "leave it out; sid eval --protocol emoji-subjects or subjects measures them afterwards",
        )


def check_references(engine: Engine) -> None:
    """Raises UsageError if the student takes reference images and the data are no pairs, or the other way round."""
    config, name = engine.config, engine.sampler.model.source.name
    if config.references:
        return  # `open_references` compares them with the teacher
    has_pairs = folder_of(config.data) is not None or (config.objective.draws_pairs and not config.data)
    if engine.layout and not has_pairs:
        raise UsageError(
            f"{name} takes a reference image, and --data does not give pairs",
            "--data runs/NAME, a run of --objective self-distillation, or --references STUDENT",
        )
    if has_pairs and not engine.layout:
        raise UsageError(f"--data {config.data} holds pairs with reference images, and {name} takes none", "leave --data out")


def open_data(engine: Engine, images: CaptionedImages | None, output: Path, teacher: str, listener: RunListener) -> Latents:
    """Return the latents of images, or of the teacher's own images if `images` is None, from the cache or computed now.

    They may be pairs of images, of the folder `config.data` or drawn to `output`. `teacher` is the fingerprint of the teacher.
    """
    config, model = engine.config, engine.sampler.model
    source: Source
    if config.objective.draws_pairs and not config.data:
        source = PairImages(pairs.prepare(engine, output / "pairs", teacher, listener), model, engine.device)
    elif folder := folder_of(config.data):
        source = PairImages(folder, model, engine.device)
    elif images is None:
        plan = plan_for(model, guidance=config.objective.drawing_guidance)
        count = config.data_num or TEACHER_IMAGES
        # Not the kernels, which a measurement selects: an interrupted command may select others, and must find its images again.
        precision = f"bf16 {engine.arithmetic.bf16}, teacher in bf16 {config.teacher_bf16}" + model.text_precision
        draw = partial(engine.teacher_latents, plan)
        source = TeacherImages(model, teacher, plan, engine.prompts, count, config.micro_batch, precision, draw)
    else:
        source = EncodedImages(images, config.data_num or len(images), model, engine.device)
    if isinstance(source, PairImages) and not source.rows:
        raise InputError(f"{source.folder} has no pair that was kept", "lower the thresholds of the run that judged them")
    data = prepare(source, engine.distributed, listener)
    model.vae.to("cpu")  # training does not use the VAE
    for line in data.notes(images.skipped if images else ()):
        listener.note(line)
    return data


class Loop:
    """The training loop: train, log, sample and save until config.steps or a signal."""

    def __init__(
        self,
        engine: Engine,
        output: Path,
        intervals: Intervals,
        writer: checkpoint.Writer,
        stop: StopFlag,
        listener: RunListener,
        tracker: Tracker | None = None,
    ):
        self.engine, self.output, self.intervals, self.writer, self.stop = engine, output, intervals, writer, stop
        self.listener, self.tracker = listener, tracker
        self.painter = Painter(engine, output / "samples", listener)
        self.proxy: Proxy | None = None
        self.record: dict[str, Any] = {}
        self.evaluations = records(output / "metrics.jsonl") if engine.distributed.is_main else {}
        """Numbers of metrics.jsonl by step, of which those of --eval-every are kept up to date; empty in other processes."""
        self.warned = False
        self.returned = False
        self.saved, self.begun = engine.step, time.monotonic()
        self.saved_at = self.begun
        self.trained = trained_seconds(output / "metrics.jsonl") if engine.distributed.is_main else 0.0
        """Training time of the whole run in seconds, as of the last record, without time lost to an interruption."""
        self.trained_before = self.trained
        there = set(checkpoint.numbered(output / "checkpoints")) | {engine.step}
        self.candidates = {step: values for step, values in self.evaluations.items() if step in there}
        """The evaluations whose student can be written: those with a checkpoint."""
        if intervals.keep_best and (top := best(self.candidates)):
            writer.best = top.step

    def run(self) -> tuple[float, dict[str, Any]]:
        """Run the loop. Returns its seconds and the last record. Raises Interrupted after saving, SidError if it diverges."""
        with self.writer:
            self.train()
            self.evaluate_and_sample(bool(self.intervals.eval), True)
        return time.monotonic() - self.begun, self.record

    def train(self) -> None:
        engine, intervals = self.engine, self.intervals
        done = 0
        while engine.step < engine.config.steps:
            self.evaluate_and_sample(
                bool(intervals.eval) and engine.step % intervals.eval == 0, engine.step % intervals.sample == 0
            )
            result = engine.train_step()
            done += 1
            finished = engine.step == engine.config.steps
            if engine.step % intervals.log == 0 or engine.step == 1 or finished:
                self.report(result, done * engine.config.batch_size / (time.monotonic() - self.begun))
            self.listener.stepped({**self.record, "step": engine.step})
            if (finished or engine.step % intervals.log == 0) and float(result.skipped_in_row) >= min(SKIPPED_LIMIT, engine.step):
                self.roll_back(float(result.skipped_in_row))
                continue
            stopped, late = self.poll_stop()
            due = (late or engine.step % intervals.save == 0) and not result.skipped_in_row
            if due or finished:
                self.save()
            if stopped:
                self.save_and_interrupt(stopped)

    def evaluate_and_sample(self, evaluate: bool, paint: bool) -> None:
        """Evaluate the student, draw its samples, or both. This does not count as training time. A signal stops it early."""
        if not (evaluate or paint):
            return
        paused = time.monotonic()
        student = self.engine.student()
        if self.engine.distributed.is_main:
            with suppress(Interrupted), self.stop.at_once():
                try:
                    if evaluate:
                        self.evaluate(student)
                    if paint:
                        self.painter.paint(student)
                except NotFinite as error:
                    self.listener.note(f"step {self.engine.step}: {error.message}")
                if paint:
                    write(run_page(self.output), self.output / "report.html")
            student.vae.to("cpu")  # training does not use the VAE
        if evaluate and self.intervals.keep_best:
            self.keep_best()
        stopped, _ = self.poll_stop()
        if stopped:
            self.save_and_interrupt(stopped)
        self.begun += time.monotonic() - paused

    def save_and_interrupt(self, number: int) -> None:
        """Save the current step unless it is saved, then raise Interrupted."""
        engine = self.engine
        self.save()
        self.wait_for_checkpoint()
        where = f"saved step {engine.step} of {engine.config.steps}" if engine.step else "nothing to save at step 0"
        raise Interrupted(number, f"interrupted; {where}", "run the same command to continue")

    def open_proxy(self) -> Proxy:
        engine = self.engine
        with self.listener.progress("teacher images for --eval-every", PROXY_IMAGES + DIVERSITY_IMAGES, "images") as advance:
            proxy = Proxy(engine, prompts_for(engine, GRID_IMAGES, PROXY_IMAGES), advance)
        self.listener.note(f"the teacher's CLIP score on the {PROXY_IMAGES} prompts of --eval-every: {proxy.goal:.4f}")
        write_json(self.output / "proxy.json", {"images": PROXY_IMAGES, "teacher_clip": round(proxy.goal, 5)})
        return proxy

    def evaluate(self, student: Model) -> None:
        """Measure the proxy metrics of the current student and append them to metrics.jsonl as a separate line."""
        self.proxy = self.proxy or self.open_proxy()
        with self.listener.progress("evaluate", PROXY_IMAGES + DIVERSITY_IMAGES, "images") as advance:
            found = self.proxy.measure(student, self.engine.plan, advance)
        self.write({"step": self.engine.step, **found})
        self.evaluations[self.engine.step] = self.candidates[self.engine.step] = found
        self.listener.note(
            f"step {self.engine.step}: CMMD to the teacher {found['proxy_cmmd']:.4f}, CLIP score {found['proxy_clip']:.4f}"
        )
        said = worsening(self.evaluations)
        if said and not self.warned:
            instead = "" if self.intervals.keep_best else ", or use --keep-best, which writes the best student instead of the last"
            self.listener.note(f"warning: {said}; start a new run with lower learning rates{instead}")
        self.warned = said is not None

    def keep_best(self) -> None:
        """Save this step, and keep its checkpoint, if its evaluation is the best so far. Only the main process knows evaluations."""
        top, engine = best(self.candidates), self.engine
        if self.agreed(engine.step if top and top.step == engine.step else 0):
            self.writer.best = engine.step
            self.save()

    def agreed(self, number: int) -> int:
        """Return the number that the main process gives, in every process. The others give 0."""
        distributed = self.engine.distributed
        return int(distributed.sum(torch.tensor(number, dtype=torch.float64, device=distributed.device)))

    def return_to_best(self) -> str:
        """Load the checkpoint of the best evaluation, if it is not the last step. Returns the reason for the loaded step."""
        engine, top = self.engine, best(self.candidates)
        found, folder = None, self.output / "checkpoints"
        if engine.distributed.is_main and top and top.step != engine.step:
            try:
                found = checkpoint.verify(folder / checkpoint.folder_name(top.step))
            except InputError as error:
                self.listener.note(f"the student is that of the last step: {error.message}")
        step = self.agreed(found.step if found else 0)
        if step:
            engine.load(step, checkpoint.read(found or checkpoint.verify(folder / checkpoint.folder_name(step))))
            self.listener.note(f"the student is that of step {step}, which has the lowest CMMD to the teacher")
        if top is None:
            return "the last step"
        return f"lowest CMMD to the teacher, {top.cmmd:.4f}" if top.step == engine.step else "the last step"

    def report(self, result: Measurements, rate: float) -> None:
        """Append one line to metrics.jsonl. A value that is not finite becomes null."""
        numbers = {name: round(value, 6) if math.isfinite(value) else None for name, value in result.numbers().items()}
        self.trained = self.trained_before + time.monotonic() - self.begun
        self.record = {
            "step": self.engine.step,
            "images": self.engine.images,
            "seconds": round(self.trained, 1),
            **numbers,
            "images_per_second": round(rate, 3),
            "memory_gb": peak_memory(self.engine),
        }
        if self.engine.distributed.is_main:
            self.write(self.record)

    def write(self, record: dict[str, Any]) -> None:
        append_line(self.output / "metrics.jsonl", json.dumps(record))
        if self.tracker:
            self.tracker.log({name: value for name, value in record.items() if value is not None}, self.engine.step)

    def poll_stop(self) -> tuple[int, bool]:
        """Return the signal that requests a stop, 0 for none, and whether a checkpoint is overdue. All processes agree on both."""
        distributed, number = self.engine.distributed, self.stop.number
        late = distributed.is_main and time.monotonic() - self.saved_at > self.intervals.save_seconds
        if distributed.accelerator is None:
            return number, late
        heard, total, late_ones = distributed.sum(
            torch.tensor([number > 0, number, late], dtype=torch.float, device=distributed.device)
        ).tolist()
        return round(total / heard) if heard else 0, late_ones > 0

    def roll_back(self, skipped: float) -> None:
        """Return to the last checkpoint. Raises SidError the second time, or if there is no checkpoint."""
        step = self.engine.step
        self.wait_for_checkpoint()
        found, _ = checkpoint.latest(self.output / "checkpoints")
        if self.returned or found is None:
            raise SidError(
                f"the training diverged: {skipped:g} updates of a network in a row were not finite at step {step}"
                + (", again" if self.returned else ", and there is no checkpoint before it"),
                "lower --lr-fake and --lr-generator, or raise --batch-size, in a new --output",
            )
        self.engine.load(found.step, checkpoint.read(found))
        self.returned, self.saved = True, found.step
        if self.engine.distributed.is_main:
            drop_records_after(
                self.output / "metrics.jsonl", found.step, is_measured(found.step, self.intervals, self.engine.config)
            )
            self.evaluations = records(self.output / "metrics.jsonl")
            self.candidates = {step: values for step, values in self.candidates.items() if step in self.evaluations}
        self.listener.note(
            f"{skipped:g} updates of a network in a row were not finite at step {step}; back to step {found.step}, once"
        )

    def save(self) -> None:
        """Start to write a checkpoint of this step, unless there is one. Training continues if memory suffices for a copy."""
        engine = self.engine
        if engine.step == self.saved:
            return
        self.saved, self.saved_at = engine.step, time.monotonic()
        if not (engine.distributed.is_main or engine.distributed.sharded):
            return
        has_room = psutil.virtual_memory().available > 2 * engine.state_bytes
        with self.writer.waiting():
            tensors = engine.tensors(copy=has_room)
        if engine.distributed.is_main:
            self.writer.write(engine.step, tensors)
            if not has_room:
                self.writer.finish()

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on disk, in every process."""
        self.writer.finish()
        self.engine.distributed.wait()


@contextmanager
def advice(config: DistillConfig) -> Iterator[None]:
    """Context that raises EnvironmentProblem if the GPU or the machine runs out of memory, with the options that are left to
    try, and SidError if another process of the run no longer responds."""
    try:
        yield
    except SidError:
        raise
    except Exception as error:
        said = out_of_memory(error)
        if said is None and count() > 1 and re.search(r"[Cc]onnection (reset|closed)|gloo|NCCL", str(error)):
            raise SidError("another process of this run has ended", "run the same command to continue") from error
        if said is None:
            raise
        switches = {
            "--micro-batch 1": config.micro_batch > 1,
            "--gradient-checkpointing": not config.gradient_checkpointing,
            "--split-backward": not config.split_backward,
            "--offload-average": not config.offload_average,
            "--offload-optimizer": not config.offload_optimizer,
            "--offload-text": not config.offload_text,
            "--memory 24gb or --memory 12gb": not config.fake_lora,
        }
        left = [name for name, helps in switches.items() if helps]
        raise EnvironmentProblem(f"out of memory: {said}", ", ".join(left) or "a smaller teacher") from error


def peak_memory(engine: Engine) -> float:
    """Return the peak memory in GB (10^9 bytes): of the GPU, or the resident memory of this process."""
    if engine.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(engine.device) / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


@contextmanager
def open_tracker(name: str | None, output: Path) -> Iterator[Tracker | None]:
    """Context with a tracker of accelerate, `tensorboard` or `wandb`, or with None."""
    if name is None:
        yield None
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(output.name, logging_dir=str(output)) if kind.requires_logging_directory else kind(output.name)
    tracker.start()
    try:
        yield tracker
    finally:
        tracker.finish()


def introduction(engine: Engine, output: Path) -> list[str]:
    """Return lines that describe a run before it starts: output, steps, batch, device and precision."""
    config, processes = engine.config, engine.distributed.count
    if engine.step == config.steps and (output / "student").is_dir():
        return [f"{output} is finished after {counted(config.steps, 'step')}; train longer with a higher --steps"]
    accumulation = -(-config.batch_size // (processes * config.micro_batch))
    split = f"micro-batch {config.micro_batch}, accumulation {accumulation}, {counted(processes, 'process')}"
    return [
        f"output: {output}; progress: {output / 'report.html'}",
        f"{counted(config.steps, 'step')} of {counted(config.batch_size, 'image')} ({split}), {engine.device}, {engine.arithmetic.name}",
    ]
