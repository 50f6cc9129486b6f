"""The model card of what we write, the licence that goes with it, and sid.json: where a student comes from and how to run it.

A student is a derivative of its teacher (the OpenRAIL licences name distillation): licence files, the licence's name and its use
restrictions are passed on.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sidcli.files import write_json
from sidcli.teachers import Model

PAPER = "2406.01561"
TERMS = ("license", "license_name", "license_link")
RESTRICTED = ("openrail", "rail++", "bigscience")


def licence(folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the card beside a model, as far as it has one."""
    try:
        content = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}
    return {key: str(content[key]) for key in TERMS if content.get(key)}


def provenance(model: Model) -> dict[str, Any]:
    """The part of sid.json that says which teacher a student comes from and under which licence."""
    source = model.source
    return {"name": source.name, "origin": source.origin, "revision": source.revision} | terms_of(model)


def terms_of(model: Model) -> dict[str, str]:
    """The licence that goes with a model: as its own sid.json has it from its teacher, else as the card beside it says."""
    known = model.card.get("teacher", {}) if model.is_student else model.card
    return {key: str(known[key]) for key in TERMS if known.get(key)} or licence(model.source.folder)


def write_card(folder: Path, model: Model, card: Mapping[str, Any], usage: str) -> None:
    """README.md, sid.json and the LICENSE files of an exported folder. `usage` is Markdown that says how to run it."""
    write_json(folder / "sid.json", dict(card))
    for file in model.source.folder.glob("LICEN[CS]E*"):
        shutil.copyfile(file, folder / file.name)
    if card.get("kind") != "student":
        return
    teacher = card.get("teacher", {})
    origin = teacher.get("origin", "unknown")
    base = origin.removeprefix("hub:") if origin.startswith("hub:") else None
    terms: dict[str, Any] = dict(terms_of(dataclasses.replace(model, card=dict(card))))
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "distillation", "one-step", "score-identity-distillation", f"arxiv:{PAPER}"],
        inference={"parameters": {"num_inference_steps": 1, "guidance_scale": 0}},
        **terms,
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{_body(card, origin, terms, usage)}", encoding="utf-8")


def _body(card: Mapping[str, Any], origin: str, terms: Mapping[str, str], usage: str) -> str:
    config = card.get("config", {})
    kappas = ", ".join(f"{config[f'kappa{index}']:g}" for index in (1, 2, 3, 4)) if "kappa1" in config else "unknown"
    revision = card.get("teacher", {}).get("revision")
    facts = {
        "Teacher": origin + (f", commit {revision}" if revision else ""),
        "Method": card.get("method", "unknown"),
        "Guidance scales (kappa 1 to 4)": kappas,
        "t_init": card.get("t_init"),
        "Denoising steps": card.get("student_steps", 1),
        "Images seen in training": card.get("images", "unknown"),
        "Prompts": card.get("prompts", "unknown"),
        "Made with": f"sid {card.get('sid', 'unknown')}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    name = terms.get("license")
    rule = f"This model is a derivative of its teacher, modified by distillation. Licence: {name or 'that of the teacher'}."
    if name and any(word in name.lower() for word in RESTRICTED):
        rule += (
            " Its use-based restrictions (paragraph 5 and attachment A of the licence) apply to this model and to everything made from"
            " it, and have to be passed on."
        )
    measured = card.get("metrics")
    table = ""
    if measured:
        lines = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
        table = f"\n## Measured\n\n| metric | value |\n| --- | --- |\n{lines}\n"
    return (
        "# A text-to-image model that draws in a single step\n\n| | |\n| --- | --- |\n"
        f"{rows}\n\n## How to run it\n\n{usage}\n{table}\n## Licence\n\n{rule}\n"
    )
