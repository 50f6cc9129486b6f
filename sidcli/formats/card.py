"""The model card of an exported folder, sid.json with its provenance, and the license files of the teacher.

Every statement of a model card is computed from the student. A student is a derivative of its teacher (the OpenRAIL licenses name
distillation), so an export includes the license files, the license name and the use restrictions of the teacher, and those of the
models that the student started from.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from sidcli.files import write_json
from sidcli.models.drawing import Plan, is_consistency, student_plan
from sidcli.models.loading import Description, Model
from sidcli.printable import printable
from sidcli.progress import counted

PAPER = "2406.01561"
TERMS = ("license", "license_name", "license_link")
RESTRICTED = ("openrail", "rail++", "bigscience")
LIBRARIES = {"diffusers": "diffusers", "lora": "diffusers", "onnx": "onnx", "openvino": "openvino"}
"""Export format -> the Hugging Face Hub's name for the library that reads it."""
PROMPT = "a cat"


def license_of(folder: Path) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of the model card (README.md) in `folder`, without missing entries."""
    try:
        content = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):
        return {}
    return {key: str(content[key]) for key in TERMS if content.get(key)}


def license_files(folder: Path) -> list[Path]:
    """Return the LICENSE files in a model's folder."""
    return sorted(file for file in folder.glob("LICEN[CS]E*") if file.is_file())


def add_licenses(folder: Path, files: Sequence[tuple[str, Path]]) -> None:
    """Copy the LICENSE files of the models that a student started from to its folder. `files` are pairs of model and file.

    If another text has the name of a file, the name of the model is added to it.
    """
    for model, file in files:
        text, part = file.read_bytes(), re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name).strip("-.")
        names = chain([file.name], (f"{file.stem}-{part}{number or ''}{file.suffix}" for number in count()))
        places = (folder / name for name in names)
        next(place for place in places if not place.exists() or place.read_bytes() == text).write_bytes(text)


def provenance(model: Model | Description) -> dict[str, Any]:
    """Return the `teacher` entry of a student's sid.json: name, origin, revision and license of the teacher `model`."""
    source = model.source
    return {"name": source.name, "origin": source.origin, "revision": source.revision} | terms_of(model)


def terms_of(model: Model | Description) -> dict[str, str]:
    """Return the license of a model from its sid.json (for a student, its teacher's license), else from its README.md."""
    known = model.card.get("teacher", {}) if model.is_student else model.card
    return {key: str(known[key]) for key in TERMS if known.get(key)} or license_of(model.source.folder)


def has_stock_sampler(card: Mapping[str, Any]) -> bool:
    """Return whether diffusers has a scheduler that draws as the student does. `card` is the content of the student's sid.json.

    No scheduler adds new noise between the steps of a student, except for that of consistency sampling.
    """
    return is_consistency(card) or card.get("renoise", "ddim") == "ddim" or student_plan(card).steps == 1


def call_options(model: Model) -> dict[str, Any]:
    """Return the arguments, other than its steps, with which a stock pipeline draws a student as sid does."""
    return model.kind.call_options(model.denoiser.config, model.size)


def call(plan: Plan, options: Mapping[str, Any]) -> str:
    """Return Python code that calls a stock pipeline `pipe`."""
    arguments = {**plan.in_diffusers, **options}
    return f'pipe("{PROMPT}", {", ".join(f"{name}={value}" for name, value in arguments.items())})'


def write_card(folder: Path, model: Model, card: Mapping[str, Any], usage: str) -> None:
    """Write README.md (for a student), sid.json and the LICENSE files of `model` to an exported folder.

    `card` is the content of sid.json; for a student it contains the `format` and `dtype` of the export. `usage` is Markdown that
    explains how to run the student.
    """
    write_json(folder / "sid.json", dict(card))
    for file in license_files(model.source.folder):
        shutil.copyfile(file, folder / file.name)
    if card.get("kind") != "student":
        return
    origin = card.get("teacher", {}).get("origin", "unknown")
    base = origin.removeprefix("hub:") if origin.startswith("hub:") else None
    is_lora = card["format"] == "lora"
    plan, library = student_plan(card), LIBRARIES.get(card["format"])
    steps = "one-step" if plan.steps == 1 else "few-step"
    terms: dict[str, Any] = dict(terms_of(dataclasses.replace(model, card=dict(card))))
    in_diffusers = library == "diffusers" and has_stock_sampler(card)
    data = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if is_lora else "finetune") if base else None,
        library_name=library,
        pipeline_tag="text-to-image",
        tags=["text-to-image", "distillation", steps, *_method_tags(card), *(["lora"] * is_lora)],
        inference={"parameters": plan.in_diffusers | call_options(model)} if in_diffusers else None,
        **terms,
    )
    title = f"{'One' if plan.steps == 1 else plan.steps}-step {'LoRA' if is_lora else 'text-to-image model'}"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        _table(_facts(model, card, origin)),
        "## How to run it",
        usage,
        "## License",
        _license(terms, card.get("init", ())),
    ]
    # The name of a license and the paths in `usage` are texts of others, too.
    (folder / "README.md").write_text(printable("\n\n".join(sections), keep="\n") + "\n", encoding="utf-8")


def _method_tags(card: Mapping[str, Any]) -> list[str]:
    """Return the name of the distillation method and the papers that it cites, as tags."""
    name = card.get("config", {}).get("objective", {}).get("name", "sid")
    papers = re.findall(r"arXiv (\d{4}\.\d{4,5})", str(card.get("method", ""))) or [PAPER]
    return ["score-identity-distillation" if name == "sid" else name, *(f"arxiv:{paper}" for paper in papers)]


def _facts(model: Model, card: Mapping[str, Any], origin: str) -> dict[str, Any]:
    config, revision = card.get("config", {}), card.get("teacher", {}).get("revision")
    config = {**config, **config.get("objective", {})}
    height, width = model.size
    facts = {
        "Teacher": origin + (f", commit {revision}" if revision else ""),
        "Method": card.get("method", "unknown"),
        "Format": f"{card['format']}, {card['dtype']}",
        "Image size": f"{width} x {height} pixels",
        "Timesteps": student_plan(card).timesteps,
        "Prediction": model.path.prediction,
    }
    if is_consistency(card):
        facts["Sampling"] = f"multistep consistency sampling, in up to {counted(card['solver_steps'], 'step')}"
    if "kappa1" in config:
        facts["Guidance scales in training (kappa 1 to 4)"] = ", ".join(f"{config[f'kappa{index}']:g}" for index in (1, 2, 3, 4))
    if "steps_trained" in card and "batch_size" in config:
        facts["Training"] = f"{counted(card['steps_trained'], 'step')}, batch size {config['batch_size']}"
    if "prompts" in card:
        facts["Training prompts"] = card["prompts"]
    if "data" in card:
        facts["Training images"] = card["data"]
    if "references" in card:
        facts["Training references"] = f"drawn by {card['references'].get('name')}"
    if "init" in card:
        facts["Started from"] = " and ".join(str(source.get("name")) for source in card["init"])
    return facts | {"Made with": f"sid {card.get('sid', 'unknown')}"}


def _table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {printable(str(value)).replace('|', '&#124;')} |" for name, value in facts.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _license(terms: Mapping[str, str], started_from: Sequence[Mapping[str, Any]]) -> str:
    """Return the statement about the license of the teacher, and about those of the models of --init that have another one."""
    name, named = _named(terms)
    if named:
        rule = f"This model is a derivative of its teacher, modified by distillation. License: {named}.{_restrictions(name)}"
    else:
        rule = "This model is a derivative of its teacher, modified by distillation, and falls under the teacher's license."
    for source in started_from:
        other, named = _named(source)
        if other not in ("", name):
            rule += f" It is also a derivative of {source['name']}, whose license is {named}.{_restrictions(other)}"
    return rule


def _named(terms: Mapping[str, str]) -> tuple[str, str]:
    """Return the name of a license, and the name as Markdown with its link; both are empty if it is not known."""
    name = terms.get("license_name") or terms.get("license") or ""
    return name, f"[{name}]({terms['license_link']})" if name and "license_link" in terms else name


def _restrictions(license: str) -> str:
    """Return a sentence about the use restrictions of a license, or "" if it has none."""
    if not any(word in license.lower() for word in RESTRICTED):
        return ""
    return (
        " The use-based restrictions of that license (paragraph 5 and Attachment A) apply to this model and to all its"
        " derivatives, and must be passed on with them."
    )
