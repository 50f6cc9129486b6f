"""Draw sheets of one subject with the teacher, judge their pairs of panels, and keep the good pairs (Diffusion Self-Distillation,
section 3.1 of arXiv 2411.18616).

Sheets are drawn in units of UNIT, each sheet is a file, and the scores of a judge are appended to a file, so that interrupted work
resumes where it stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sidcli import randomness
from sidcli.curation import JUDGES, open_judge
from sidcli.curation.agreement import agreement
from sidcli.curation.gates import Gates, seam_score
from sidcli.curation.judge import Judge, Pair, Verdict
from sidcli.data.imagesets import digest
from sidcli.data.pair_images import panels
from sidcli.data.pairs import Box, PairRow, write_rows
from sidcli.data.sheets import SheetPrompt, sheet_prompt
from sidcli.engine import Engine
from sidcli.errors import InputError
from sidcli.files import append_line, atomic_file, read_json, write_json
from sidcli.formats.pictures import contact_sheet, save_png
from sidcli.metrics.ssim import copy_score
from sidcli.models.codec import to_bytes
from sidcli.models.drawing import Plan
from sidcli.objectives.self_distillation import SelfDistillationSettings
from sidcli.progress import Progress, RunListener, counted, silent

UNIT = 16
"""Sheets that are drawn together."""
COLUMNS = 2
WAYS = {
    "other subject": "a lower --set same, or another --set judge",
    "caption": "a lower --set caption, or another --set judge",
    "copy": "a higher --set copy",
    "cut": "a lower --set cut",
}
"""Gate -> how to let more pairs pass."""
EXAMPLES = 12
"""Kept and rejected pairs in the picture of a curation, each."""


def prepare(engine: Engine, folder: Path, teacher: str, listener: RunListener) -> Path:
    """Return the folder with the pairs of a run, after what is missing was drawn and judged. `teacher` is its fingerprint.

    Raises InputError if the folder holds sheets of other settings, or if no pair is kept.
    """
    if engine.distributed.is_main:
        judge = opened_judge(engine)  # a judge that cannot be opened is an error before the sheets are drawn
        draw_sheets(engine, folder, teacher, listener)
        curate(engine, folder, judge, listener)
    engine.distributed.wait()
    return folder


def settings_of(engine: Engine) -> SelfDistillationSettings:
    assert isinstance(engine.config.objective, SelfDistillationSettings)
    return engine.config.objective


def sheet_file(index: int) -> str:
    return f"sheets/{index:08d}.png"


def draw_sheets(engine: Engine, folder: Path, teacher: str, listener: RunListener) -> None:
    """Draw the sheets that the folder lacks."""
    config, settings = engine.config, settings_of(engine)
    check_same(folder, engine, teacher)
    units = [range(start, min(start + UNIT, settings.sheets)) for start in range(0, settings.sheets, UNIT)]
    missing = [unit for unit in units if not all((folder / sheet_file(index)).is_file() for index in unit)]
    if not missing:
        return
    with listener.progress("draw sheets", sum(map(len, missing)), "sheets") as advance:
        for unit in missing:
            prompts = [sheet_prompt(engine.prompts, config.seed, index, settings.panels) for index in unit]
            images = drawn(engine, unit, prompts, partial(advance, len(unit) / settings.sheet_steps))
            for index, image in zip(unit, images, strict=True):
                save_png(Image.fromarray(image), folder / sheet_file(index))
    engine.sampler.model.vae.to("cpu")  # training does not use the VAE


def check_same(folder: Path, engine: Engine, teacher: str) -> None:
    """Record what determines the sheets. Raises InputError if the folder has sheets of other settings."""
    config, s = engine.config, settings_of(engine)
    settings: dict[str, Any] = {"teacher": teacher, "prompts": engine.prompts.digest, "seed": config.seed, "panels": s.panels}
    settings |= {"pairs": s.pairs, "guidance": s.sheet_guidance, "steps": s.sheet_steps, "size": list(engine.sampler.model.size)}
    file = folder / "sheets.json"
    if file.exists() and (before := read_json(file)) != settings:
        changed = [f"{key}: {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
        raise InputError(f"{folder} holds sheets of other settings: {'; '.join(changed)}", "choose another --output for a new run")
    if not file.exists() and any((folder / "sheets").glob("*.png")):
        raise InputError(f"{folder} holds sheets and no sheets.json, which says how they were drawn", f"delete {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def drawn(engine: Engine, indices: range, prompts: Sequence[SheetPrompt], stepped: Any) -> np.ndarray:
    """Return sheets uint8 [B, H, W, 3] with panels of the model's size."""
    settings, model = settings_of(engine), engine.sampler.model
    rows = settings.panels // COLUMNS
    plan = Plan(settings.sheet_steps, settings.sheet_guidance)
    channels, height, width = model.latent_shape
    shape = channels, rows * height, COLUMNS * width
    noise = randomness.normal(shape, engine.config.seed, "sheet", 0, indices)
    if settings.pairs == "grid":
        latents = engine.teacher_latents(plan, [prompt.text for prompt in prompts], noise, stepped)
    else:
        captions = [caption for prompt in prompts for caption in prompt.captions]
        with shared_attention(engine, settings.panels):
            latents = joined(engine.teacher_latents(plan, captions, cut(noise, rows), stepped), rows)
    codec = model.codec.to(engine.device)
    with torch.no_grad():
        decoded = torch.cat([codec.decode(one[None].to(engine.device)) for one in latents])
    return to_bytes(decoded, [prompt.text for prompt in prompts], list(indices), "a smaller --set sheet_guidance")


def cut(sheets: Tensor, rows: int) -> Tensor:
    """Return the panels [B rows 2, C, h, w] of sheets [B, C, rows h, 2 w], those of a sheet in reading order."""
    panels = [part for row in sheets.chunk(rows, -2) for part in row.chunk(COLUMNS, -1)]
    return torch.stack(panels, 1).flatten(0, 1)


def joined(panels: Tensor, rows: int) -> Tensor:
    """Return the sheets [B, C, rows h, 2 w] of panels [B rows 2, C, h, w]."""
    parts = panels.unflatten(0, (-1, rows, COLUMNS))
    return torch.cat([torch.cat(list(row.unbind(1)), -1) for row in parts.unbind(1)], -2)


@contextmanager
def shared_attention(engine: Engine, panels: int) -> Iterator[None]:
    """Context in which the teacher draws `panels` consecutive images of a batch with one self-attention over all of them.

    It makes panels of one subject with models that cannot draw sheets, without training (arXiv 2405.01434, arXiv 2402.03286).
    Raises InputError if the teacher is no UNet.
    """
    engine.kind.share_attention(engine.teacher, panels)
    try:
        yield
    finally:
        engine.kind.share_attention(engine.teacher, 1)


def boxes(model_size: tuple[int, int], panels: int) -> list[Box]:
    """Return the boxes of the panels of a sheet in pixels, in reading order."""
    height, width = model_size
    places = [divmod(place, COLUMNS) for place in range(panels)]
    return [(column * width, row * height, (column + 1) * width, (row + 1) * height) for row, column in places]


def candidates(engine: Engine) -> list[PairRow]:
    """Return all pairs of panels of the sheets, in order, without scores."""
    settings, seed = settings_of(engine), engine.config.seed
    places = boxes(engine.sampler.model.size, settings.panels)
    rows = []
    for index in range(settings.sheets):
        prompt = sheet_prompt(engine.prompts, seed, index, settings.panels)
        for one, other in combinations(range(settings.panels), 2):
            captions = prompt.captions[one], prompt.captions[other]
            rows.append(PairRow(sheet_file(index), (places[one], places[other]), prompt.subject, captions, seed, index))
    return rows


def curate(engine: Engine, folder: Path, judge: Judge, listener: RunListener) -> None:
    """Score all pairs with the judge, apply the gates, and write pairs.jsonl, the counts and a picture of the first pairs.

    Raises InputError if no pair is kept.
    """
    settings, rows = settings_of(engine), candidates(engine)
    scored, gates = scores(engine, folder, rows, judge, listener)
    reasons = [gates.rejection(Verdict(row.same, row.text), row.copy, row.cut) for row in scored]  # type: ignore[arg-type]
    judged = [replace(row, kept=reason is None, reason=reason or row.reason) for row, reason in zip(scored, reasons, strict=True)]
    write_rows(folder, judged)
    counts: Counter[str] = Counter(reason or "kept" for reason in reasons)
    found: dict[str, Any] = {"judge": settings.judge, "gates": asdict(gates), "pairs": len(rows), "counts": dict(counts)}
    if engine.sampler.model.is_emoji:
        found["oracle"] = against_oracle(engine, folder, judged)
    write_json(folder / "curation.json", found)
    save_png(examples(folder, judged), folder / "examples.png")
    listener.note(summary(settings, counts, len(rows)))
    if not counts["kept"]:
        way = "" if settings.pairs == "shared-attention" else ", or --set pairs=shared-attention if the teacher cannot draw grids"
        (most, _), *_ = counts.most_common()
        raise InputError(
            f"none of {counted(len(rows), 'pair')} is kept: most fail the gate {most!r}; {folder / 'examples.png'} shows some",
            f"{WAYS[most]}{way}",
        )


def summary(settings: SelfDistillationSettings, counts: Counter[str], total: int) -> str:
    """Return a sentence about the yield of a curation."""
    rejected = ", ".join(f"{count} {reason}" for reason, count in counts.most_common() if reason != "kept")
    return f"pairs: {counts['kept']} of {total} kept by judge {settings.judge} ({counts['kept'] / total:.0%})" + (
        f"; rejected: {rejected}" if rejected else ""
    )


class Unjudged:
    """A judge that accepts every pair, so that only the gates of copies and of cuts apply."""

    name = "none"
    same_threshold = text_threshold = 0.0

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        advance(len(pairs))
        return [Verdict(0.0, 0.0)] * len(pairs)


def judge_options(settings: SelfDistillationSettings) -> dict[str, str | None]:
    """Return the options of the judge by name: those that it has, and others that are given, which `open_judge` refuses."""
    options = {"model": settings.judge_model or None, "url": settings.judge_url or None}
    return {name: value for name, value in options.items() if name in JUDGES.get(settings.judge, ()) or value}


def opened_judge(engine: Engine) -> Judge:
    """Return the judge of a run. Raises UsageError or InputError if it cannot be opened."""
    settings = settings_of(engine)
    if settings.judge == "none":
        return Unjudged()
    return open_judge(settings.judge, engine.sampler.model, engine.device, **judge_options(settings))


def scores(
    engine: Engine, folder: Path, rows: Sequence[PairRow], judge: Judge, listener: RunListener
) -> tuple[list[PairRow], Gates]:
    """Return the pairs with their scores, and the gates. Scores that an earlier call has written are not computed again."""
    settings = settings_of(engine)
    file = folder / f"scores-{settings.judge}-{digest(sorted(judge_options(settings).items()))}.jsonl"
    known = read_scores(file)[: len(rows)]
    if len(known) < len(rows):
        with listener.progress(f"judge pairs ({settings.judge})", len(rows) - len(known), "pairs") as advance:
            for start in range(len(known), len(rows), UNIT):
                part = rows[start : start + UNIT]
                pairs = [Pair(*panels(folder, row), row.subject, row.captions) for row in part]
                known += written(file, folder, zip(part, pairs, judge.judge(pairs, advance), strict=True), settings.pairs == "grid")
    same = judge.same_threshold if settings.same == "auto" else float(settings.same)
    text = judge.text_threshold if settings.caption == "auto" else float(settings.caption)
    gates = Gates(same, text, settings.copy, settings.cut)
    return [replace(row, **score) for row, score in zip(rows, known, strict=True)], gates


def written(file: Path, folder: Path, judged: Iterable[tuple[PairRow, Pair, Verdict]], is_grid: bool) -> list[dict[str, Any]]:
    """Append the scores of pairs to a file, and return them."""
    found = []
    for row, pair, verdict in judged:
        score = {"same": verdict.same, "text": verdict.text, "reason": verdict.reason}
        # Panels with a shared attention are images of their own, which meet in the sheet only.
        score |= {"copy": copy_score(*pair.panels), "cut": seam(folder, row) if is_grid else 1.0}
        append_line(file, json.dumps(score))
        found.append(score)
    return found


def read_scores(file: Path) -> list[dict[str, Any]]:
    """Return the scores in a file, up to a line that an interruption has cut off, which is removed."""
    found: list[dict[str, Any]] = []
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        try:
            score = json.loads(line)
            found.append({name: score[name] for name in ("same", "text", "reason", "copy", "cut")})
        except (ValueError, KeyError, TypeError):
            break
    if len(found) < len(lines):
        with atomic_file(file) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines[: len(found)]), encoding="utf-8")
    return found


def seam(folder: Path, row: PairRow) -> float:
    """Return the lowest score of the seams at which the sheet of a pair was cut."""
    with Image.open(folder / row.sheet) as opened:
        sheet = np.asarray(opened.convert("RGB"))
    (_, top, _, bottom), (height, width, _) = row.boxes[0], sheet.shape
    found = [seam_score(sheet, width // COLUMNS, 1)]
    return min(found + ([seam_score(sheet, height // 2, 0)] if bottom - top < height else []))


def against_oracle(engine: Engine, folder: Path, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Return yield, precision and recall of the kept pairs by the oracle of the emoji world."""
    oracle = open_judge("oracle", engine.sampler.model, engine.device)
    verdicts = oracle.judge([Pair(*panels(folder, row), row.subject, row.captions) for row in rows])
    truth = [one.same >= oracle.same_threshold and one.text >= oracle.text_threshold for one in verdicts]
    found = agreement([row.kept for row in rows], truth)
    return {"good": sum(truth), **{name: value and asdict(value) for name, value in vars(found).items()}}


def examples(folder: Path, rows: Sequence[PairRow]) -> Image.Image:
    """Return a picture of the first kept and the first rejected pairs, with the reasons."""
    shown = [*[row for row in rows if row.kept][:EXAMPLES], *[row for row in rows if not row.kept][:EXAMPLES]]
    pictures = [Image.fromarray(np.concatenate(panels(folder, row), 1)) for row in shown]
    return contact_sheet(pictures, [f"{row.subject}: {'kept' if row.kept else row.reason}" for row in shown], 6)
