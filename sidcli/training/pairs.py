"""Draw sheets of one subject with the teacher, judge their pairs of panels, and keep the good pairs (Diffusion Self-Distillation,
section 3.1 of arXiv 2411.18616).

Sheets are drawn in units of UNIT, each sheet is a file, and the scores of a judge are appended to a file, so that interrupted work
resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sidcli import randomness
from sidcli.curation import open_judge
from sidcli.curation.agreement import agreement
from sidcli.curation.gates import Gates, cut_score
from sidcli.curation.judge import Judge, Pair, Verdict
from sidcli.data.imagesets import digest
from sidcli.data.pair_images import is_intact, panels
from sidcli.data.pairs import MAX_ROWS, ROWS, Box, PairRow, difference, lines_of, write_rows
from sidcli.data.prompts import EmojiPrompts
from sidcli.data.sheets import SheetPrompt
from sidcli.engine import Engine
from sidcli.errors import InputError, Interrupted, NothingKept
from sidcli.files import append_line, appended, read_bytes, read_json, sha256, write_json
from sidcli.formats.pictures import contact_sheet, save_png
from sidcli.metrics.ssim import copy_score
from sidcli.models.codec import to_bytes
from sidcli.models.drawing import Plan
from sidcli.objectives.self_distillation import SelfDistillationSettings
from sidcli.progress import Progress, RunListener, counted, silent
from sidcli.training.scenes import sheet_prompts

UNIT = 16
"""Sheets that are drawn together."""
COLUMNS = 2
WAYS = {
    "same": "a lower --set same, or another --set judge",
    "caption": "a lower --set caption, or another --set judge",
    "copy": "a higher --set copy",
    "cut": "a lower --set cut",
}
"""Gate -> how to let more pairs pass."""
EXAMPLES = 12
"""Kept and rejected pairs in the picture of a curation, each."""
FEW = 0.02
"""Share of kept pairs below which a note says how more pairs pass."""
SCORES = ("same", "caption", "copy", "cut", "words")
"""Entries of a line of scores."""


def prepare(engine: Engine, folder: Path, teacher: str, listener: RunListener) -> Path:
    """Return the folder with the pairs of a run, after what is missing was drawn and judged. `teacher` is its fingerprint.

    Raises InputError if the folder holds sheets of other settings or if pairs.jsonl was edited, NothingKept if no pair is kept,
    Interrupted at a signal.
    """
    if engine.distributed.is_main:
        judge = opened_judge(engine)
        try:
            check_same(folder, engine, teacher)
            prompts = sheet_prompts(settings_of(engine), engine.prompts, engine.config.seed, folder, listener)
            if units := missing_units(engine, folder, listener):
                if settings_of(engine).judge != "none":
                    try_judge(engine, judge, prompts[0], listener)
                draw_sheets(engine, folder, units, prompts, listener)
            curate(engine, folder, judge, candidates(engine, prompts), listener)
        except Interrupted as error:
            raise Interrupted(
                error.exit_code - 128,
                f"interrupted before the first step; the sheets and scores in {folder} are kept",
                "run the same command to continue",
            ) from error
    engine.distributed.wait()
    return folder


def settings_of(engine: Engine) -> SelfDistillationSettings:
    assert isinstance(engine.config.objective, SelfDistillationSettings)
    return engine.config.objective


def sheet_file(index: int) -> str:
    return f"sheets/{index:08d}.png"


def missing_units(engine: Engine, folder: Path, listener: RunListener) -> list[range]:
    """Return the units with a sheet that is missing or damaged. The listener is told of damaged ones."""
    settings, (height, width) = settings_of(engine), engine.sampler.model.size
    size = COLUMNS * width, settings.panels // COLUMNS * height
    bad = [index for index in range(settings.sheets) if not is_intact(folder / sheet_file(index), size)]
    if damaged := [sheet_file(index) for index in bad if (folder / sheet_file(index)).exists()]:
        more = f" and {len(damaged) - 3} others" if len(damaged) > 3 else ""
        listener.note(f"drawn again, because they are damaged: {', '.join(damaged[:3])}{more} in {folder}")
    units = [range(start, min(start + UNIT, settings.sheets)) for start in range(0, settings.sheets, UNIT)]
    return [unit for unit in units if not {*unit}.isdisjoint(bad)]


def try_judge(engine: Engine, judge: Judge, prompt: SheetPrompt, listener: RunListener) -> None:
    """Let the judge score a trial pair, so that a missing model, an endpoint that does not answer or captions that it does not know are
    an error before the sheets are drawn."""
    (height, width), (first, second, *_) = engine.sampler.model.size, prompt.captions
    light, dark = (np.full((height, width, 3), shade, np.uint8) for shade in (200, 60))
    with listener.progress(f"try judge {judge.name}", 1, "pairs") as advance:
        judge.judge([Pair(light, dark, prompt.subject, (first, second))], advance)


def draw_sheets(
    engine: Engine, folder: Path, units: Sequence[range], prompts: Sequence[SheetPrompt], listener: RunListener
) -> None:
    """Draw the sheets of some units."""
    steps = settings_of(engine).sheet_steps
    with listener.progress("draw sheets", sum(map(len, units)), "sheets") as advance:
        for unit in units:
            images = drawn(engine, unit, [prompts[index] for index in unit], partial(advance, len(unit) / steps))
            for index, image in zip(unit, images, strict=True):
                save_png(Image.fromarray(image), folder / sheet_file(index))
    engine.sampler.model.vae.to("cpu")  # training does not use the VAE


def check_same(folder: Path, engine: Engine, teacher: str) -> None:
    """Record what determines the sheets. Raises InputError if the folder has sheets of other settings."""
    config, s = engine.config, settings_of(engine)
    settings: dict[str, Any] = {"teacher": teacher, "prompts": engine.prompts.digest, "seed": config.seed, "panels": s.panels}
    settings |= {"pairs": s.pairs, "guidance": s.sheet_guidance, "steps": s.sheet_steps, "size": list(engine.sampler.model.size)}
    settings |= {"scenes": s.scenes_model} if s.scenes == "http" else {}
    settings |= {"shared noise": s.shared_noise} if s.shared_noise else {}
    file = folder / "sheets.json"
    hint = f"restore it, which says how the sheets were drawn, or delete {folder}"
    if file.exists() and (before := read_json(file, hint)) != settings:
        changed = [
            f"{key}: {before.get(key)} -> {settings.get(key)}" for key in before | settings if before.get(key) != settings.get(key)
        ]
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
    noise = sheet_noise(model.latent_shape, rows, settings.shared_noise, engine.config.seed, indices)
    if settings.pairs == "grid":
        latents = engine.teacher_latents(plan, [prompt.text for prompt in prompts], noise, stepped)
    else:
        captions = [caption for prompt in prompts for caption in prompt.captions]
        with shared_attention(engine, settings.panels):
            latents = joined(engine.teacher_latents(plan, captions, panels_of(noise, rows), stepped), rows)
    codec = model.codec.to(engine.device)
    with torch.no_grad():
        decoded = torch.cat([codec.decode(one[None].to(engine.device)) for one in latents])
    return to_bytes(decoded, [prompt.text for prompt in prompts], list(indices), "a smaller --set sheet_guidance")


def sheet_noise(shape: tuple[int, int, int], rows: int, shared: float, seed: int, indices: range) -> Tensor:
    """Return the noise [B, C, rows h, 2 w] of sheets, whose panels have the `shape` (C, h, w).

    `shared` is the share of its variance that all panels of a sheet have in common: the mixed noise of arXiv 2305.10474, where it is
    alpha^2 / (1 + alpha^2).
    """
    channels, height, width = shape
    own = randomness.normal((channels, rows * height, COLUMNS * width), seed, "sheet", 0, indices)
    if not shared:
        return own
    common = randomness.normal(shape, seed, "sheet, shared", 0, indices).repeat(1, 1, rows, COLUMNS)
    return (1.0 - shared) ** 0.5 * own + shared**0.5 * common


def panels_of(sheets: Tensor, rows: int) -> Tensor:
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


def candidates(engine: Engine, prompts: Sequence[SheetPrompt]) -> list[PairRow]:
    """Return all pairs of panels of the sheets with these prompts, in order, without scores."""
    settings, seed = settings_of(engine), engine.config.seed
    places = boxes(engine.sampler.model.size, settings.panels)
    rows = []
    for index, prompt in enumerate(prompts):
        for one, other in combinations(range(settings.panels), 2):
            captions = prompt.captions[one], prompt.captions[other]
            rows.append(PairRow(sheet_file(index), (places[one], places[other]), prompt.subject, captions, seed, index))
    return rows


def curate(engine: Engine, folder: Path, judge: Judge, rows: Sequence[PairRow], listener: RunListener) -> None:
    """Score pairs with the judge, apply the gates, and write pairs.jsonl, curation.json and a picture of the first pairs.

    Raises InputError if pairs.jsonl or the scores are not those that sid wrote, NothingKept if no pair is kept.
    """
    settings = settings_of(engine)
    scored = scores(engine, folder, rows, judge, listener)
    gates = gates_of(settings, judge)
    judged = gated(scored, gates)
    check_unedited(folder, scores_file(settings), scored, judged)
    write_rows(folder, judged)
    counts = Counter(row.reason or "kept" for row in judged)
    found: dict[str, Any] = {"judge": settings.judge, "gates": asdict(gates), "pairs": len(rows), "counts": dict(counts)}
    if engine.sampler.model.is_emoji and isinstance(engine.prompts, EmojiPrompts):
        found["oracle"] = against_oracle(engine, folder, judged)
    scores_of_rows = scores_file(settings)
    found["sha256"] = {ROWS: sha256(folder / ROWS), scores_of_rows: hash_of_lines(folder / scores_of_rows, len(rows))}
    write_json(folder / "curation.json", found)
    save_png(examples(folder, judged), folder / "examples.png")
    listener.note(summary(settings, counts, len(rows)))
    if counts["kept"] < FEW * len(rows):
        told = few(settings, counts, len(rows), folder)
        if not counts["kept"]:
            raise NothingKept(*told)
        listener.note("warning: {}; {}".format(*told))


def gates_of(settings: SelfDistillationSettings, judge: Judge) -> Gates:
    """Return the thresholds of a run."""
    is_fixed = settings.judge == "none"  # accepts every pair
    same, caption = (
        usual if is_fixed or given == "auto" else float(given)
        for given, usual in ((settings.same, judge.same_threshold), (settings.caption, judge.caption_threshold))
    )
    return Gates(same, caption, settings.copy, settings.cut)


def gated(rows: Sequence[PairRow], gates: Gates) -> list[PairRow]:
    """Return pairs that have scores, with whether each passes the gates."""
    reasons = [gates.rejection(Verdict(row.same, row.caption), row.copy, row.cut) for row in rows]  # type: ignore[arg-type]
    return [replace(row, kept=reason is None, reason=reason or "") for row, reason in zip(rows, reasons, strict=True)]


def check_unedited(folder: Path, scores: str, scored: Sequence[PairRow], judged: Sequence[PairRow]) -> None:
    """Raises InputError if the file of scores, or pairs.jsonl, is not the one whose hash is in curation.json.

    `judged` are the pairs of the current settings. Files that equal them were written by a call that was interrupted before it wrote
    curation.json.
    """
    file, record = folder / ROWS, folder / "curation.json"
    before = read_json(record, f"delete {record} and {file}, which are written again from the scores") if record.exists() else {}
    hashes = found if isinstance(found := before.get("sha256"), dict) else {}
    count = before.get("pairs")
    used = count if isinstance(count, int) and count >= 0 else 0  # else curation.json was edited, and the hash is of other lines
    if scores in hashes and hashes[scores] != hash_of_lines(folder / scores, used):
        raise InputError(
            f"{folder / scores} was edited since sid wrote it: its hash is not that of {record}",
            f"restore it, or delete it and {record} to judge the pairs again",
        )
    content = read_bytes(file, MAX_ROWS) if file.exists() else None
    if content is None or content == lines_of(judged) or hashes.get(ROWS) == sha256(file):
        return
    try:
        wrote = gated(scored, Gates(**before["gates"])) if scores in hashes else judged
    except (KeyError, TypeError):  # curation.json was edited, too
        wrote = judged
    raise InputError(
        f"{file} was edited since sid wrote it: {difference(content, wrote)}",
        "restore it, or delete it to write it again from the scores;"
        f" to train on edited pairs, copy {folder} and give the copy as --data",
    )


def hash_of_lines(file: Path, count: int) -> str:
    """Return the SHA-256 of the first `count` lines of a file. More sheets append lines."""
    with file.open("rb") as lines:
        return hashlib.sha256(b"".join(islice(lines, count))).hexdigest()


def few(settings: SelfDistillationSettings, counts: Counter[str], total: int, folder: Path) -> tuple[str, str]:
    """Return how few pairs are kept, with the gates that reject them, and how more pairs pass."""
    gates = [gate for gate, _ in counts.most_common() if gate != "kept"]
    ways = [WAYS[gate] for gate in gates]
    if settings.pairs == "grid":
        ways.append("--set pairs=shared-attention in a new --output if the teacher cannot draw grids")
    if "same" in gates and not settings.shared_noise:
        ways.append("--set shared_noise=0.8 in a new --output")
    kept, verb = f"only {counts['kept']}" if counts["kept"] else "none", "are" if counts["kept"] > 1 else "is"
    failed = ", ".join(f"{gate} {counts[gate]}" for gate in gates)
    said = f"{kept} of {counted(total, 'pair')} {verb} kept; rejected by gate: {failed}; {folder / 'examples.png'} shows some"
    return said, "; ".join([*ways, "more --set sheets"] if counts["kept"] else ways)


def summary(settings: SelfDistillationSettings, counts: Counter[str], total: int) -> str:
    """Return a sentence about the yield of a curation."""
    rejected = ", ".join(f"{gate} {count}" for gate, count in counts.most_common() if gate != "kept")
    return f"pairs: {counts['kept']} of {total} kept by judge {settings.judge} ({counts['kept'] / total:.0%})" + (
        f"; rejected by gate: {rejected}" if rejected else ""
    )


class Unjudged:
    """A judge that accepts every pair, so that only the gates of copies and of cuts apply."""

    name, unit = "none", UNIT
    same_threshold = caption_threshold = 0.0

    def judge(self, pairs: Sequence[Pair], advance: Progress = silent) -> list[Verdict]:
        advance(len(pairs))
        return [Verdict(0.0, 0.0)] * len(pairs)


def opened_judge(engine: Engine) -> Judge:
    """Return the judge of a run. Raises UsageError or InputError if it cannot be opened."""
    settings = settings_of(engine)
    if settings.judge == "none":
        return Unjudged()
    return open_judge(settings.judge, engine.sampler.model, engine.device, **settings.judge_options)


def scores_file(settings: SelfDistillationSettings) -> str:
    """Return the name of the file with the scores of a judge and its options."""
    return f"scores-{settings.judge}-{digest(sorted(settings.judge_options.items()))}.jsonl"


def scores(engine: Engine, folder: Path, rows: Sequence[PairRow], judge: Judge, listener: RunListener) -> list[PairRow]:
    """Return the pairs with their scores. Scores that an earlier call has written are not computed again, up to the pairs of a unit of
    which it has written a part: the rounding of a score depends on the other pairs of its unit."""
    settings = settings_of(engine)
    file = folder / scores_file(settings)
    known = read_scores(file)[: len(rows)]
    if len(known) < len(rows):
        first = len(known) - len(known) % judge.unit
        with listener.progress(f"judge pairs ({settings.judge})", len(rows) - first, "pairs") as advance:
            for start in range(first, len(rows), judge.unit):
                part = rows[start : start + judge.unit]
                pairs = [Pair(*panels(folder, row), row.subject, row.captions) for row in part]
                judged = [*zip(part, pairs, judge.judge(pairs, advance), strict=True)][len(known) - start :]
                known += written(file, folder, judged, settings.pairs == "grid")
    return [replace(row, **score) for row, score in zip(rows, known, strict=True)]


def written(file: Path, folder: Path, judged: Iterable[tuple[PairRow, Pair, Verdict]], is_grid: bool) -> list[dict[str, Any]]:
    """Append the scores of pairs to a file, and return them."""
    found = []
    for row, pair, verdict in judged:
        # Panels with a shared attention are images of their own, which meet in the sheet only.
        values = verdict.same, verdict.caption, copy_score(*pair.panels), lowest_cut(folder, row) if is_grid else 1.0, verdict.words
        score = dict(zip(SCORES, values, strict=True))
        append_line(file, json.dumps(score))
        found.append(score)
    return found


def read_scores(file: Path) -> list[dict[str, Any]]:
    """Return the scores in a file."""

    def parsed(line: str) -> dict[str, Any]:
        score = json.loads(line)
        return {name: score[name] for name in SCORES}

    return appended(file, parsed)


def lowest_cut(folder: Path, row: PairRow) -> float:
    """Return the lowest score of the cuts through the sheet of a pair."""
    with Image.open(folder / row.sheet) as opened:
        sheet = np.asarray(opened.convert("RGB"))
    (_, top, _, bottom), (height, width, _) = row.boxes[0], sheet.shape
    found = [cut_score(sheet, width // COLUMNS, 1)]
    return min(found + ([cut_score(sheet, height // 2, 0)] if bottom - top < height else []))


def against_oracle(engine: Engine, folder: Path, rows: Sequence[PairRow]) -> dict[str, Any]:
    """Return yield, precision and recall of the kept pairs by the oracle of the emoji world."""
    oracle = open_judge("oracle", engine.sampler.model, engine.device)
    verdicts = oracle.judge([Pair(*panels(folder, row), row.subject, row.captions) for row in rows])
    truth = [one.same >= oracle.same_threshold and one.caption >= oracle.caption_threshold for one in verdicts]
    found = agreement([row.kept for row in rows], truth)
    return {"good": sum(truth), **{name: value and asdict(value) for name, value in vars(found).items()}}


def examples(folder: Path, rows: Sequence[PairRow]) -> Image.Image:
    """Return a picture of the first kept and the first rejected pairs, with the reasons."""
    shown = [*[row for row in rows if row.kept][:EXAMPLES], *[row for row in rows if not row.kept][:EXAMPLES]]
    pictures = [Image.fromarray(np.concatenate(panels(folder, row), 1)) for row in shown]
    return contact_sheet(pictures, [f"{row.subject}: {'kept' if row.kept else f'rejected by {row.reason}'}" for row in shown], 6)
