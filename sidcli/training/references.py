"""`--references`: a student that draws the reference images of a training, whose teacher takes them."""

from __future__ import annotations

import dataclasses

from sidcli.data.drawn_references import DrawnReferences
from sidcli.engine import Engine
from sidcli.errors import InputError, UsageError
from sidcli.models.loading import Description, Model, describe, load
from sidcli.models.overrides import Overrides
from sidcli.models.sampler import Sampler, plan_for
from sidcli.models.sources import find, fingerprint
from sidcli.progress import Listener
from sidcli.settings import DistillConfig

HINT = "--references takes a student of the model that the teacher was tuned from: a run folder, or a folder of weights"


def describe_student(config: DistillConfig, teacher: Description | Model, listener: Listener) -> Description:
    """Return the description of the student of `config.references`, in the image size of the run. Reads no weights.

    Raises UsageError if the teacher takes no reference image, InputError if the model is not found, is no student, takes a reference
    image itself, or draws latents of another shape than the teacher's reference images.
    """
    name = config.references
    if not teacher.layout:
        raise UsageError(f"--references {name}: {teacher.source.name} takes no reference image", "leave --references out")
    try:
        known = describe(find(name, listener, descriptions_only=True), size_of(config), listener)
    except InputError as error:
        raise InputError(f"--references {name}: {error.message}", HINT) from error
    if not known.is_student:
        raise InputError(f"--references {name} is not a student, and draws in too many steps", HINT)
    if known.layout:
        raise InputError(f"--references {name} takes a reference image itself", HINT)
    own, wanted = known.kind.frame_shape(known.denoiser_config), frame_of(teacher)
    if own != wanted:
        shapes = [" x ".join(map(str, shape)) for shape in (own, wanted)]
        raise InputError(f"--references {name} draws latents of {shapes[0]}, and {teacher.source.name} takes {shapes[1]}", HINT)
    return known


def size_of(config: DistillConfig) -> Overrides:
    """Return how the student is read: in the image size of the run. The other overrides are those of the teacher's files."""
    return Overrides(width=config.width, height=config.height)


def frame_of(teacher: Description | Model) -> tuple[int, int, int]:
    """Return channels, height and width of the latent of a reference image."""
    config = teacher.denoiser.config if isinstance(teacher, Model) else teacher.denoiser_config
    return teacher.kind.frame_shape(config)


def open_references(engine: Engine, listener: Listener) -> DrawnReferences:
    """Load the student of `config.references` to the device of a training, with weights in bf16 if the frozen teacher's are.

    Raises what `describe_student` raises, and InputError if its VAE has other weights, or another scale or shift, than the teacher's.
    """
    config, teacher = engine.config, engine.sampler.model
    known = describe_student(config, teacher, listener)
    listener.note(f"loading {config.references}, which draws the reference images")
    source = find(config.references, listener)
    student = load(source, size_of(config))
    if student.codec.digest() != teacher.codec.digest():
        raise InputError(f"--references {config.references}: its VAE is not that of {teacher.source.name}", HINT)
    if config.teacher_bf16 and engine.arithmetic.bf16:
        for value in student.denoiser.parameters():
            value.data = value.data.bfloat16()
    # The teacher's VAE in place of an equal one, so that it is in memory once.
    student = dataclasses.replace(student, vae=teacher.vae, text_on_cpu=config.offload_text)
    return DrawnReferences(Sampler(student, engine.device), plan_for(known), fingerprint(source))
