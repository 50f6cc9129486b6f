"""The Python API: `from sidcli import load, sample, distill, evaluate, export`. The commands of `sid` call these functions.

A model name has the same form as on the command line: an embedded name, a diffusers folder, a run folder, a single file or a hub
id. A `listener` receives progress and notes. The default listener prints them to stderr; the listener `SILENT` prints nothing.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sidcli.data.pairs import folder_of
from sidcli.data.tables import check_column
from sidcli.devices import check_name, choose_device, pick_device
from sidcli.errors import UsageError
from sidcli.evaluation.spec import Bound, Files, JudgeSpec, ModelSpec, Rules, check_protocol
from sidcli.evaluation.spec import Request as Evaluation
from sidcli.files import check_writable
from sidcli.formats.order import DEFAULT_RANK, Order, check, check_used
from sidcli.formats.outputs import BACKENDS, Places, check_export, check_named
from sidcli.models.overrides import Overrides, check_precision, check_reference_guidance, check_sampling
from sidcli.numeric import plain
from sidcli.objectives import OBJECTIVES, names
from sidcli.printable import printable, with_article
from sidcli.progress import Listener, Progress, RunListener, Silence, counted, in_words
from sidcli.settings import FIELDS
from sidcli.training.intervals import Intervals
from sidcli.training.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from sidcli.data.references import Reference
    from sidcli.evaluation.run import Outcome
    from sidcli.formats.export import Exported
    from sidcli.formats.images import Samples
    from sidcli.models.loading import Model
    from sidcli.training.distill import Result

PathLike = str | os.PathLike[str]
SILENT = Silence()
USUAL = Intervals()
SETTINGS = {*FIELDS, *(name for objective in OBJECTIVES.values() for name in names(objective))} - {"teacher", "objective"}
"""Settings of a distillation and of its objectives, which `distill` takes beside its arguments."""


class Bars:
    """The default listener. It prints tqdm progress bars, which a notebook shows as widgets, and notes to stderr."""

    def __init__(self) -> None:
        from tqdm.auto import tqdm

        self.tqdm = tqdm
        self.bar: Any = None

    def note(self, text: str) -> None:
        self.tqdm.write(printable(text), file=sys.stderr)

    @contextmanager
    def progress(self, what: str, total: int, unit: str = "") -> Iterator[Progress]:
        with self.tqdm(
            total=total, desc=printable(what), unit=f" {unit}", unit_scale=unit == "bytes", leave=False, delay=1.0
        ) as bar:

            def advance(count: float, text: str = "") -> None:
                bar.set_postfix_str(printable(text), refresh=False)
                bar.update(count)

            yield advance

    def started(self, step: int, steps: int) -> None:
        self.bar = self.tqdm(initial=step, total=steps, desc="distill", unit=" steps")

    def stepped(self, record: dict[str, Any]) -> None:
        self.bar.set_postfix_str(in_words(record), refresh=False)
        self.bar.update(record["step"] - self.bar.n)
        if record["step"] >= self.bar.total:
            self.bar.close()


Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def _refuses_unknown(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Return a function that raises UsageError, with the most similar name, for a keyword that it does not have."""
    known = [name for name, one in inspect.signature(function).parameters.items() if one.kind is not one.VAR_KEYWORD]
    more = SETTINGS if len(known) < len(inspect.signature(function).parameters) else ()

    @functools.wraps(function)
    def wrapped(*arguments: Parameters.args, **named: Parameters.kwargs) -> Returned:
        for name in named:
            if name not in known and name not in more:
                close = difflib.get_close_matches(name, [*known, *more], 1)
                what = "setting" if more else "argument"
                raise UsageError(f"unknown {what} {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return function(*arguments, **named)

    return wrapped


@_refuses_unknown
def load(
    name: PathLike,
    *,
    prediction_type: str = "auto",
    model_config: PathLike = "",
    width: int = 0,
    height: int = 0,
    listener: Listener | None = None,
) -> Model:
    """Load a teacher or a student in float32 on the CPU.

    Args:
        name: Embedded name, diffusers folder, run folder, single file, or hub id (`OWNER/NAME@revision`).
        prediction_type: Prediction type of the network if its files do not state it: "epsilon" or "v_prediction".
        model_config: Diffusers folder whose JSON files describe a single file.
        width, height: Image size in pixels; 0: the model's own size.

    Returns:
        A model with its networks (`denoiser`, `vae`, `text_encoders`), tokenizers and metadata. Pass it to `sample`.

    Raises:
        InputError: If the model is not found, is damaged, or is of a kind that sid does not support.
        UsageError: If an argument has an invalid value.
    """
    name = _name("name", name)
    width, height = _typed(width=(width, int), height=(height, int))
    known = Overrides(prediction_type, os.fspath(model_config), width, height)
    from sidcli.models.loading import open_model

    return open_model(name, listener or Bars(), known)


@_refuses_unknown
def sample(
    prompts: str | Sequence[str],
    model: PathLike | Model = "emoji",
    *,
    num: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    reference: PathLike | Image | Sequence[PathLike | Image] | None = None,
    reference_guidance: float | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    width: int = 0,
    height: int = 0,
    prediction_type: str = "auto",
    model_config: PathLike = "",
    backend: str = "auto",
    precision: str = "fp32",
    batch_size: int = 16,
    device: str = "auto",
    listener: Listener | None = None,
) -> Samples:
    """Generate images from prompts.

    Args:
        prompts: One prompt or several.
        model: A model name, or the return value of `load`. A loaded model already has an image size and a prediction type.
        num: Images per prompt, with seeds `seed`, `seed` + 1, ...
        steps: Denoising steps; by default 50 for a teacher, and the student's own number for a student.
        guidance: Guidance scale of a teacher.
        reference: Image whose subject the images show, for a model that takes one: a file or a PIL image, or a list of them with one for
            each prompt. With one prompt, a list shows its subject several times, for a model with the layout `frames`.
        reference_guidance: Guidance scale of the reference, 0 to 100; 1, the default, is no guidance.
        output: A .png file for one image, or a folder for several; None: no file is written.
        width, height: Image size in pixels; 0: the model's own size.
        backend: "auto", "torch", "onnx" or "openvino"; the last two run an exported graph.
        precision: "fp32" or "bf16", the arithmetic of the networks. bf16 is faster on GPUs, and on CPUs with AMX or AVX512-BF16;
            values of pixels differ by a few units of 255.
        batch_size: Images computed at once; does not change the images.
        device: "auto", "cpu", "cuda" or "cuda:INDEX".

    Returns:
        Samples: `images` are PIL images in the order of prompts and seeds; `drawn` has the prompt, seed and file of each image.

    Raises:
        InputError: If the model or the reference is not found, is damaged, or is of a kind that sid does not support.
        UsageError: If an argument has an invalid value, or a file exists and `overwrite` is False.
        EnvironmentProblem: If the device is not available, or a folder cannot be written.
    """
    num, seed, steps, batch_size = _typed(num=(num, int), seed=(seed, int), steps=(steps, int), batch_size=(batch_size, int))
    guidance, reference_guidance = _typed(guidance=(guidance, float), reference_guidance=(reference_guidance, float))
    width, height, *_ = _typed(width=(width, int), height=(height, int), device=(device, str), overwrite=(overwrite, bool))
    _typed(output=("" if output is None else output, PATH))
    texts = _prompts(prompts)
    check_reference_guidance(reference_guidance)
    given_references = _references(reference, len(texts))
    _check_least(num=num, batch_size=batch_size)
    check_sampling(steps, guidance)
    _check_machine(backend, device, precision)
    count = len(texts) * num
    places = Places.of(output, count) if output is not None else None
    if places:
        places.check(overwrite)
    known = Overrides(prediction_type, os.fspath(model_config), width, height)
    given = _name("model", model) if isinstance(model, str | os.PathLike) or not hasattr(model, "denoiser") else model
    if not isinstance(given, str) and known != Overrides():
        raise UsageError("a loaded model has its size and prediction already", "give them to load()")
    listener = listener or Bars()
    from sidcli.models.sources import graph_format, read_card

    if not (isinstance(given, str) and Path(given).is_dir() and graph_format(Path(given))):
        pick_device(device)  # before libraries that take seconds to import
    from sidcli.data.references import with_references
    from sidcli.emoji import vocabulary
    from sidcli.formats import images

    opened = images.open_drawer(given, backend, device, steps, guidance, listener, known, precision)
    if read_card(opened.source).get("world") == "emoji" and (about := vocabulary.remark(texts, opened.source.name)):
        listener.note(about)
    opened, shown = with_references(opened, given_references, len(texts), reference_guidance, listener)
    listener.note(f"drawing with {opened.source.name} ({opened.plan.describe()})")
    with listener.progress("draw", count, "images") as advance:
        drawn = images.run(opened, texts, num, seed, places, batch_size, advance, overwrite, shown)
    _remove(places.others if places and overwrite else (), listener)
    _tell_truncated(drawn.truncated, listener)
    return drawn


def _check_machine(backend: str, device: str, precision: str) -> None:
    """Raises UsageError for an unknown backend, device or precision."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    check_name(device)
    check_precision(precision)


def _tell_truncated(count: int, listener: Listener) -> None:
    if count:
        were = "was" if count == 1 else "were"
        listener.note(f"{counted(count, 'prompt')} {were} longer than the text encoder reads and {were} truncated")


def _remove(images: Sequence[Path], listener: Listener) -> None:
    """Remove the images of an earlier call in the same folder."""
    for file in images:
        file.unlink()
    if images:
        listener.note(f"removed {counted(len(images), 'image')} of an earlier call from {images[0].parent}")


def _references(given: object, count: int) -> list[Reference]:
    """Return the reference images: none, one, one for each of `count` prompts, or any number for one prompt.

    Raises InputError if a file is missing or is no image, UsageError for another number or another type.
    """
    if given is None:
        return []
    from PIL.Image import Image

    from sidcli.data.references import Reference

    listed: list[Any] = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not all(isinstance(one, str | os.PathLike | Image) for one in listed):
        raise UsageError(f"reference must be a path, a PIL image, or a list of them, not {given!r}")
    if any(isinstance(one, str | os.PathLike) and not os.fspath(one) for one in listed):
        raise UsageError("reference must be a path, not ''", "leave it out, or give the path of an image")
    if not listed or (count > 1 and len(listed) not in (1, count)):
        raise UsageError(
            f"{counted(len(listed), 'reference image')} for {counted(count, 'prompt')}", "give one, or one for each prompt"
        )
    return [Reference.of(one) if isinstance(one, Image) else Reference.read(Path(one)) for one in listed]


@_refuses_unknown
def distill(
    teacher: PathLike | None = None,
    output: PathLike | None = None,
    *,
    objective: str | None = None,
    guidance: float | None = None,
    guidance_strategy: str | None = None,
    objective_settings: Mapping[str, Any] | None = None,
    lr: float | None = None,
    images: int | None = None,
    memory: str = "auto",
    config: PathLike | None = None,
    device: str = "auto",
    intervals: Intervals = USUAL,
    resume: PathLike | None = None,
    tracker: str | None = None,
    command: str = "sidcli.distill, from Python",
    listener: RunListener | None = None,
    **settings: Any,
) -> Result:
    """Distill a teacher into a one-step student, or continue the run in the folder `output`.

    Args:
        teacher: Model name of the teacher; by default the teacher of `config`, else "emoji-teacher".
        output: Run folder; by default runs/TEACHER-gGUIDANCE, with the objective if it is not sid.
        objective: Distillation method; see `sidcli.objectives.OBJECTIVES`.
        guidance, guidance_strategy: Guidance scale and guidance strategy of the objective.
        objective_settings: Settings of the objective, by name.
        lr: Learning rate of both networks.
        images: Training images per network; sets the number of steps instead of `steps`.
        memory: Memory recipe: "auto", "fast", "24gb" or "12gb"; or "16gb", "48gb" or "80gb", the first recipe that fits.
        config: TOML file of settings, such as a run's config.toml.
        device: "auto", "cpu", "cuda" or "cuda:INDEX".
        intervals: Steps between checkpoints, samples and evaluations.
        resume: Checkpoint to continue from; by default the newest.
        tracker: "tensorboard" or "wandb"; None: no tracker.
        command: Command line to record in run.json.
        settings: Fields of `sidcli.settings.DistillConfig`, such as `steps`, `batch_size`, `prompts` and `data`, or settings of the
            objective.

    Returns:
        The run folder, the student's folder, and the numbers of steps, images and seconds.

    Raises:
        UsageError: If a setting or an argument has an invalid value.
        InputError: If the teacher, the prompts or the images are not found or not supported, or the settings of a continued run changed.
        EnvironmentProblem: If a device or a library is missing, or memory or disk space is too small.
        Interrupted: If a signal stopped the run; the state is saved first.
        SidError: If the training diverged.
    """
    guidance, lr, images = _typed(guidance=(guidance, float), lr=(lr, float), images=(images, int))
    _typed(objective=(objective, str), output=("" if output is None else output, PATH), device=(device, str))
    check_named(output)
    settings = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}
    request = Request.of(
        None if teacher is None else _name("teacher", teacher),
        Path(output) if output else None,
        objective,
        guidance,
        guidance_strategy,
        objective_settings or {},
        lr,
        images,
        memory,
        Path(config) if config else None,
        settings,
    )
    check_name(device)
    listener = listener or Bars()
    checkpoint = Path(resume) if resume else None
    with request.naming_file():
        request.check(False, bool(intervals.eval), tracker, checkpoint)
        prompts, pictures = request.prompts(listener), request.images(listener)
        resolved, _ = request.resolve(listener, device)
        from sidcli.training import plan

        plan.check(resolved, request.folder, intervals.checkpoints, listener)
    from sidcli.data.prompts import BUILT_IN
    from sidcli.models.loading import open_model
    from sidcli.training import distill as driver
    from sidcli.training import initial

    if "prompts" not in request.own and resolved.prompts in BUILT_IN and not folder_of(resolved.data):
        listener.note(f"prompts: {prompts.name} (built in; override with --prompts FILE)")
    loaded = open_model(request.teacher, listener, resolved.overrides)
    start = initial.open_initial(resolved.init, loaded, listener) if resolved.init else None
    return driver.run(
        loaded, resolved, prompts, request.folder, device, intervals, checkpoint, listener, tracker, command, pictures, start
    )


@_refuses_unknown
def evaluate(
    models: PathLike | ModelSpec | Sequence[PathLike | ModelSpec] = ("emoji", "emoji-teacher"),
    metrics: str | Sequence[str] = (),
    *,
    everything: bool = False,
    protocol: str = "auto",
    reference: PathLike | None = None,
    prompts: PathLike | None = None,
    column: str = "",
    num: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    untrained: int = 0,
    bounds: Sequence[Bound] = (),
    inception: PathLike | None = None,
    clip_model: PathLike | None = None,
    cmmd_model: PathLike | None = None,
    dino_model: PathLike | None = None,
    judge: str | None = None,
    judge_url: str | None = None,
    judge_model: str | None = None,
    image_folder: PathLike | None = None,
    precision: str = "fp32",
    batch_size: int = 50,
    device: str = "auto",
    listener: Listener | None = None,
) -> Outcome | None:
    """Evaluate models or folders of images side by side. Generated images are stored in the cache.

    Args:
        models: Model names as on the command line, `NAME[,steps=N][,guidance=G]`, or folders and zip files of images.
        metrics: Metrics to compute: "fid", "kid", "prdc", "clip", "cmmd", "dino", "accuracy", "composition", "fid_infinity", and of
            models that take a reference image "identity", "dino_i", "clip_i" and "diversity"; empty: the default metrics of the protocol.
        everything: Compute all metrics of the protocol.
        protocol: "auto", "emoji", "emoji-subjects", "subjects", "coco2014-30k" or "custom".
        reference: Images or statistics to compare with; the folder of reference images with prompts for "subjects".
        prompts, column: File of captions to generate images from, and the caption column if the file is a table.
        num: Images per model.
        steps, guidance: Denoising steps and guidance scale of the teachers whose name does not state them.
        untrained: Also evaluate each teacher as an untrained student of this many steps; 0: do not.
        bounds: Limits of metric values; the outcome lists values beyond a limit in `beyond`.
        inception, clip_model, cmmd_model, dino_model: Files, folders or names of the networks that the metrics use.
        judge: "http" asks a vision language model for scores of images that have a reference image; its key is in SID_API_KEY.
        judge_url, judge_model: The OpenAI-compatible endpoint of the judge, and the name of the model there.
        image_folder: Store the generated images in this folder instead of the cache.
        precision: "fp32" or "bf16", the arithmetic of the networks that draw; images of both are stored apart.

    Returns:
        The outcome: `rows` with model, sampling plan, number of images n, and values with their 95 % intervals; `table()`,
        `latex()`, `as_dict()`, `write(picture, report)`. In a group of processes, None on every rank except 0.

    Raises:
        InputError: If models, images or networks are not found or not supported.
        UsageError: If the protocol does not support the request.
        EnvironmentProblem: If the device is not available, or a folder cannot be written.
    """
    num, seed, steps, batch_size = _typed(num=(num, int), seed=(seed, int), steps=(steps, int), batch_size=(batch_size, int))
    guidance, untrained, _ = _typed(guidance=(guidance, float), untrained=(untrained, int), device=(device, str))
    _typed(prompts=(prompts or "", PATH), reference=(reference or "", PATH), metrics=(metrics, (str, Sequence)))
    if not 0 <= untrained <= 100:
        raise UsageError(f"--untrained must be at least 0 and at most 100, not {untrained}")
    check_protocol(protocol)
    check_column(column, prompts)
    _check_least(batch_size=batch_size, num=num)
    _check_machine("auto", device, precision)
    listed = models if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    if not listed:
        raise UsageError("nothing to measure: no model given", "a model's name, or a folder of images")
    request = Evaluation(
        models=ModelSpec.parse_all(
            [one if isinstance(one, ModelSpec) else _name("models", one) for one in listed], steps, guidance
        ),
        metrics=[*([metrics] if isinstance(metrics, str) else metrics), *["judge"] * (judge is not None)],
        everything=everything,
        bounds=bounds,
        protocol=Rules(protocol, _path("reference", reference), _path("prompts", prompts), column, num, seed, untrained),
        networks=_networks(inception, clip_model, cmmd_model, dino_model),
        batch_size=batch_size,
        image_folder=_image_folder(image_folder),
        judge=JudgeSpec.of(judge, judge_url, judge_model),
        precision=precision,
    )
    listener = listener or Bars()
    where = choose_device(device, listener)
    from sidcli.evaluation.run import run

    return run(request, where, listener)


def _networks(inception: PathLike | None, *names: PathLike | None) -> Files:
    """Return the locations of the metric networks: Inception, then the models of CLIP, CMMD and DINOv2."""
    return Files(_path("inception", inception), *(None if name is None else os.fspath(name) for name in names))


def _image_folder(place: PathLike | None) -> Path | None:
    """Return the folder of generated images. Raises UsageError or EnvironmentProblem if it cannot be one."""
    check_named(place, "--image-folder")
    folder = _path("image_folder", place)
    if folder:
        check_writable(folder, "--image-folder")
    return folder


def _check_least(**values: int | None) -> None:
    """Raises UsageError if a value is below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def _prompts(prompts: object) -> list[str]:
    """Return one prompt or several as a list. Raises UsageError if there is none, or one is empty or not a string."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"prompts must be a string or a list of strings, not {prompts!r}")
    if not texts:
        raise UsageError("nothing to draw: no prompt given", 'sid sample "a cat", or --prompts FILE')
    if any(not text.strip() for text in texts):
        raise UsageError("an empty prompt", "describe what to draw")
    return list(texts)


def _name(argument: str, model: object) -> str:
    """Return a model name as text. Raises UsageError if it is neither a string nor a path, for example a loaded model."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    raise UsageError(
        f"{argument} must be a model name or a path, not {with_article(type(model).__name__)}",
        f'such as {argument}="emoji-teacher"',
    )


OPTIONAL = ("steps", "guidance", "reference_guidance", "lr", "images", "rank", "objective", "num")
"""Arguments that may be None."""
PATH = (str, os.PathLike)
TYPES = {PATH: "a path", (str, Sequence): "a list of names"}
"""Texts for types that have no name of their own."""


def _typed(**given: tuple[object, Any]) -> list[Any]:
    """Return the arguments, numbers of other libraries as Python's own.

    Raises UsageError if an argument is not of its type. Numbers that convert exactly are accepted, and None for an argument of
    OPTIONAL.
    """
    values = [plain(value, kind) for value, kind in given.values()]
    for (name, (_, kind)), value in zip(given.items(), values, strict=True):
        is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not is_right and not (value is None and name in OPTIONAL):
            raise UsageError(f"{name} must be {kind.__name__ if isinstance(kind, type) else TYPES[kind]}, not {value!r}")
    return values


def _path(name: str, place: PathLike | None) -> Path | None:
    """Return the path of an argument. Raises UsageError for an empty one, which would be the current folder."""
    if place is not None and not os.fspath(place):
        raise UsageError(f"{name} must be a path, not ''", "leave it out, or give a path")
    return None if place is None else Path(place)


@_refuses_unknown
def export(
    model: PathLike,
    output: PathLike,
    format: str = "diffusers",
    *,
    dtype: str = "fp32",
    variant: str | None = None,
    teacher: PathLike | None = None,
    rank: int | None = None,
    verify: bool = True,
    license: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    prediction_type: str = "auto",
    model_config: PathLike = "",
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Exported:
    """Export a student for use in other programs.

    Args:
        model: A run folder, a student's folder or file, "emoji", or a .pkl file of the authors of SiD-LSG.
        output: Folder to write.
        format: "diffusers", "single-file", "onnx", "openvino", "torch-export" or "lora".
        dtype: "fp32", "fp16" or "bf16".
        variant: "fp16" adds this variant to the names of diffusers' weight files.
        teacher: Model name of the teacher that a LoRA or a .pkl file was distilled from.
        rank: LoRA rank; by default the rank of the training, else 64.
        verify: Generate an image with the export and compare it with the student's image before the folder is created.
        license: License of the teacher if its files do not state it.
        push_to_hub: Hub repository OWNER/NAME to upload to; a new repository is private unless `public` is True.

    Returns:
        The folder, its files with sizes in bytes and hashes, and the largest pixel difference that the verification found.

    Raises:
        InputError: If the model is not a student, or cannot be exported in this format.
        UsageError: If an argument has an invalid value, or the folder exists and `overwrite` is False.
        EnvironmentProblem: If a library is not installed, or disk space is too small.
        GateError: If the export generates a different image than the student.
    """
    model, teacher = _name("model", model), None if teacher is None else _name("teacher", teacher)
    rank, *_ = _typed(rank=(rank, int), format=(format, str), dtype=(dtype, str), output=(output, PATH), verify=(verify, bool))
    check_named(output)
    is_released = Path(model).suffix.lower() == ".pkl"
    if is_released and teacher is None:
        raise UsageError("a .pkl holds a UNet alone", "--teacher ID: the model that it was distilled from")
    if push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", push_to_hub):
        raise UsageError(f"--push-to-hub must be OWNER/NAME, not {push_to_hub!r}")
    place = Path(output)
    place = Path(os.path.abspath(place)) if place.name in ("", "..") else place
    _check_least(rank=rank)
    order = Order(dtype, variant, rank or DEFAULT_RANK)
    check(format, order)
    check_used(format, is_released, teacher, rank, public, push_to_hub)
    check_export(place, overwrite)
    known = Overrides(prediction_type, os.fspath(model_config))
    listener = listener or Bars()
    from sidcli.formats import export as driver

    student, order = driver.Request(model, format, order, rank, teacher, known, license, push_to_hub).open(place, listener)
    with listener.progress(f"export {format}", 3, "stages") as advance:
        done = driver.run(student, format, place, order, verify, advance, overwrite)
    if done.difference is not None:
        listener.note(f"verified: the export draws the same image as sid, at most {done.difference}/255 apart")
    if done.loss is not None:
        more = "; a higher --rank keeps more" if done.loss else ""
        listener.note(f"the LoRA's image is at most {done.loss}/255 from the student's own{more}")
    if push_to_hub:
        from sidcli.models.hub import upload

        url = upload(done.folder, push_to_hub, not public, listener)
        listener.note(f"uploaded to {url} ({'public' if public else 'private, if it was made now'})")
    return done
