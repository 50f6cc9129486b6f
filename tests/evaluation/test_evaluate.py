"""One pass over each set of images, kept and continued; tables, gates and errors of `sid eval`."""

from __future__ import annotations

import json
import re
import shutil
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sidcli import api, devices
from sidcli.data.imagefiles import open_images
from sidcli.data.imagesets import UNIT, Collection, DrawnSet, FileSet, SceneSet
from sidcli.distributed import Distributed, Share
from sidcli.emoji import world
from sidcli.errors import InputError, UsageError
from sidcli.evaluation.candidates import REAL, Candidate, Drawing, check_used, resolve, to_measure
from sidcli.evaluation.protocols import Networks, Protocol, bare_captions, choose, custom, emoji, emoji_subjects, listed
from sidcli.evaluation.run import Outcome, beyond, latex, not_applicable, page, pictures, table
from sidcli.evaluation.scores import METRICS_OF_OPTION, SUBJECTS_ONLY, Evaluation, Row, chosen
from sidcli.evaluation.spec import Bound, ModelSpec, check_protocol, limits
from sidcli.metrics.catalog import METRICS, Measured
from sidcli.models.drawing import Plan, png_info
from sidcli.models.sources import find
from sidcli.progress import Progress, Silence, silent
from sidcli.report.page import Table, render
from tests import REPOSITORY
from tests.commands import sid, together

CPU = torch.device("cpu")
NETWORKS = Networks(CPU, Silence())


def quick(images: int = 100) -> Protocol:
    """The emoji protocol with a small reference."""
    return replace(emoji(NETWORKS), reference=Collection(SceneSet(world.REFERENCE_SEED), images))


class Brightness:
    """An extractor that remembers how many images it was shown."""

    reads_captions = False

    def __init__(self, name: str = "brightness") -> None:
        self.name, self.seen = name, 0

    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        self.seen += len(images)
        return np.array(
            [[image.mean(), len(caption)] for image, caption in zip(images, captions or [""] * len(images), strict=True)]
        )


class Painter:
    """Draws each seed as a gray of its own, and counts."""

    truncated = 0

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def images(
        self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent, references: object = None
    ) -> np.ndarray:
        self.drawn += seeds
        return np.stack([np.full((8, 8, 3), seed % 256, np.uint8) for seed in seeds])


def drawn_set(painter: Painter, count: int, **changes: object) -> DrawnSet:
    arguments = {
        "source": find("emoji"),
        "plan": Plan(1, grid=(625,)),
        "prompts": ["a cat"] * count,
        "prompts_key": "cats",
        "seed": 3,
    }
    return DrawnSet(**(arguments | {"open_drawer": lambda: painter, "batch_size": 16} | changes))  # type: ignore[arg-type]


def filled(collection: Collection, *extractors: Brightness, share: Share = Share()) -> None:  # noqa: B008
    collection.fill(extractors, share, silent)


def test_image_i_has_seed_plus_i_and_says_in_its_file_what_made_it() -> None:
    images = drawn_set(Painter(), 20)
    assert [int(image[0, 0, 0]) for image in images.read(range(20))] == list(range(3, 23))
    with Image.open(images.file(7)) as kept:
        assert json.loads(kept.text["sid"])["seed"] == 10  # type: ignore[attr-defined]
    assert json.loads(kept.text["sid"])["prompt"] == "a cat"


def test_seconds_per_image_are_those_of_this_commands_drawing_and_none_where_the_cache_had_every_image() -> None:
    first, again, more = (drawn_set(Painter(), 20) for _ in range(3))
    assert first.seconds_per_image is None
    first.read(range(16))
    assert first.seconds_per_image is not None and first.drawn == 16
    again.read(range(16))
    assert again.seconds_per_image is None
    more.read(range(20))
    assert more.seconds_per_image is not None and more.drawn == 4


def test_progress_counts_parts_of_images_as_they_are_drawn_and_each_image_once() -> None:
    class Slow(Painter):
        def images(
            self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent, references: object = None
        ) -> np.ndarray:
            for _ in range(4):
                advance(len(prompts) / 4, "step")
            return super().images(prompts, seeds, plan)

    images = drawn_set(Slow(), UNIT + 20)
    images.read(range(10))

    def heard() -> list[tuple[float, str]]:
        found: list[tuple[float, str]] = []
        Collection(images, UNIT + 20).fill([Brightness()], Share(), lambda count, text="": found.append((count, text)))
        return found

    first, again = heard(), heard()
    assert sum(count for count, _ in first) == sum(count for count, _ in again) == pytest.approx(UNIT + 20)
    drawn = [count for count, text in first if text == "step"]
    assert sum(drawn) == pytest.approx(UNIT + 10) and len(drawn) == 4 * (6 + 2), "ten were drawn before"
    assert [text for _, text in again] == ["", ""], "every feature is in the cache"


def test_a_set_that_was_interrupted_or_damaged_goes_on_where_it_stopped() -> None:
    first, second = Painter(), Painter()
    drawn_set(first, 20).read(range(12))
    drawn_set(first, 20).file(5).unlink()
    drawn_set(first, 20).file(6).write_bytes(b"\x89PNG")
    again = drawn_set(second, 20).read(range(20))
    assert second.drawn == [8, 9, *range(15, 23)]
    assert [int(image[0, 0, 0]) for image in again] == list(range(3, 23))


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"prompts_key": "dogs"}, {"plan": Plan(1, grid=(500,))}, {"source": find("emoji-teacher")}]
)
def test_images_of_another_seed_prompt_plan_or_model_are_not_mistaken_for_these(change: dict[str, object]) -> None:
    assert drawn_set(Painter(), 5, **change).key != drawn_set(Painter(), 5).key


def test_features_are_computed_once_and_a_set_that_grew_only_for_what_is_new() -> None:
    look, scenes = Brightness(), SceneSet(world.FLOOR_SEED)
    filled(Collection(scenes, UNIT), look)
    filled(Collection(scenes, UNIT), look)
    assert look.seen == UNIT
    filled(Collection(scenes, 2 * UNIT + 10), look)
    assert look.seen == 2 * UNIT + 10
    assert Collection(scenes, 2 * UNIT + 10).features(look).shape == (2 * UNIT + 10, 2)


def test_features_of_other_networks_captions_or_treatment_are_other_features() -> None:
    scenes, reader, blind = SceneSet(world.FLOOR_SEED), Brightness("reader"), Brightness("blind")
    reader.reads_captions = True  # type: ignore[misc]
    for captions in (["a cat"] * 10, ["a dog!"] * 10):
        filled(Collection(scenes, 10, captions), reader, blind)
    assert (reader.seen, blind.seen) == (20, 10)
    dark = Collection(scenes, 10, prepare=lambda image: image // 2, prepared="dark")
    filled(dark, blind)
    assert dark.features(blind)[0, 0] < Collection(scenes, 10).features(blind)[0, 0]


def test_a_damaged_file_of_the_cache_is_computed_again() -> None:
    look, collection = Brightness(), Collection(SceneSet(world.FLOOR_SEED), 10)
    filled(collection, look)
    before = collection.features(look)
    file = collection.file(look, collection.units()[0])
    file.write_bytes(file.read_bytes()[:-9])
    assert collection.lacks(look)
    filled(collection, look)
    np.testing.assert_array_equal(collection.features(look), before)


def test_processes_that_share_the_work_compute_what_one_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, collection = Brightness(), Collection(SceneSet(world.FLOOR_SEED), 2 * UNIT + 10)
    filled(collection, look)
    alone = collection.features(look)
    monkeypatch.setenv("SID_CACHE_DIR", str(tmp_path / "other"))
    parts = [Brightness(), Brightness()]
    for rank, part in enumerate(parts):
        filled(collection, part, share=Share(rank, 2))
    assert [part.seen for part in parts] == [UNIT + 10, UNIT]
    np.testing.assert_array_equal(collection.features(look), alone)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("emoji", ModelSpec("emoji", 50, None)),
        ("emoji-teacher,steps=10,guidance=1.5", ModelSpec("emoji-teacher", 10, 1.5, stated=("steps", "guidance"))),
        ("a/b@main,guidance=2", ModelSpec("a/b@main", 50, 2.0, stated=("guidance",))),
    ],
)
def test_a_model_may_say_how_it_is_to_draw(text: str, spec: ModelSpec) -> None:
    assert ModelSpec.parse(text, 50, None) == spec


@pytest.mark.parametrize("text", ["emoji,steps=x", "emoji,stops=2", "emoji,steps"])
def test_another_word_behind_a_comma_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither steps=N nor guidance=G"):
        ModelSpec.parse(text, None, None)


def test_the_interval_of_a_share_is_written_by_its_ends() -> None:
    assert METRICS["noun"].write_measured(Measured(1.0, 0.963, 1.0)) == "100.0 % [96.3, 100.0]"
    assert METRICS["recall"].write_measured(Measured(0.5, 0.402, 0.598)) == "0.500 [0.402, 0.598]"
    assert METRICS["fid"].write_measured(Measured(14.8, 12.8, 16.8)) == "14.80 ± 2.00"


def test_numbers_that_are_none_are_null_in_json() -> None:
    broken = Row("a", "", 8, {"kid": Measured(float("nan"), float("-inf"), 1.0)}, None)
    assert broken.as_dict()["metrics"]["kid"] == {"value": None, "low": None, "high": 1.0}


def test_images_wanted_for_themselves_are_drawn_even_where_their_features_are_known(tmp_path: Path) -> None:
    look = Brightness()
    filled(Collection(drawn_set(Painter(), 5), 5), look)
    filled(Collection(drawn_set(Painter(), 5, place=tmp_path / "kept"), 5), look)
    assert len(list((tmp_path / "kept").rglob("*.png"))) == 5 and look.seen == 5


class Listening(Silence):
    """Remembers what a user is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_images_take_no_sampling_and_a_comparison_is_a_png(scenes_folder: Path) -> None:
    with pytest.raises(UsageError, match="holds images, which steps= and guidance= do not change"):
        resolve(ModelSpec.parse(f"{scenes_folder},steps=2", None, None), 0, Silence())
    evaluation = Evaluation(quick(), [Candidate("a", "", SceneSet(0))], ["clip"], 2, Distributed(CPU))
    with pytest.raises(UsageError, match=r"--picture must end in .png, not rows.jpg"):
        Outcome(evaluation, [], [], [], 0).write("rows.jpg", None)


def test_files_that_are_ignored_are_reported(scenes_folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(scenes_folder / "cat.png")
    Image.new("RGB", (8, 8)).save(scenes_folder / "dog.tif")
    listener = Listening()
    resolve(ModelSpec(str(scenes_folder)), 0, listener)
    assert listener.said == [
        f"{scenes_folder}: ignoring images that are not PNG, JPEG, WebP, BMP or GIF: 1 .tif",
        f"{scenes_folder}: using 10 numbered images; ignoring 1 other image",
    ]


@pytest.mark.parametrize("name", ["000000.png", "some.npz", "photo.tif"])
def test_a_file_that_is_neither_a_model_nor_a_set_of_images_is_refused(name: str, scenes_folder: Path) -> None:
    (scenes_folder / name).touch()
    with pytest.raises(InputError, match=f"{name} is neither a model nor a folder or .zip of images"):
        resolve(ModelSpec(str(scenes_folder / name)), 0, Silence())


def test_a_path_with_a_comma_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    assert ModelSpec.parse(str(tmp_path / "a,b"), None, None).name == str(tmp_path / "a,b")


@pytest.fixture
def scenes_folder(tmp_path: Path) -> Path:
    """Ten scenes as files, which answer the protocol's captions."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    for index in range(10):
        Image.fromarray(world.render(world.scene(world.PROMPT_SEED, index))).save(folder / f"{index:06d}.png")
    return folder


def test_a_folder_of_real_scenes_gets_the_numbers_of_real_scenes(scenes_folder: Path) -> None:
    rules = quick()
    found = resolve(ModelSpec(str(scenes_folder)), 0, Silence())
    candidates = to_measure(found, rules, 10, Drawing(CPU, 0, 10, None))
    evaluation = Evaluation(rules, candidates, ["kid", "clip", "noun", "color"], 10, Distributed(CPU))
    evaluation.fill(Silence())
    real, ours = evaluation.rows(Silence())
    assert (real.model, real.is_real, real.n, ours.n) == (REAL, True, 10, 10)
    for metric in ("kid", "clip", "noun"):
        assert ours.metrics[metric].value == pytest.approx(real.metrics[metric].value, abs=1e-6)
    assert ours.metrics["noun"].value >= 0.9 and ours.metrics["clip"].value > 0.8
    shown = pictures(evaluation)
    text = render(page(evaluation, [real, ours], shown, 0))
    assert "real scenes" in text and METRICS["kid"].meaning in text


def test_the_clip_score_falls_when_captions_are_shuffled() -> None:
    rules = emoji(NETWORKS)
    assert rules.captions is not None
    said = rules.captions.first(60)
    scores = []
    for captions in (said, said[1:] + said[:1]):
        collection = Collection(SceneSet(world.PROMPT_SEED), 60, captions)
        collection.fill([rules.extractors.clip], Share(), silent)
        scores.append(collection.features(rules.extractors.clip).mean())
    assert scores[0] > scores[1] + 0.3


def test_of_several_models_one_at_a_time_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rules, held = emoji(NETWORKS), []

    class Heavy(Painter):
        def images(
            self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent, references: object = None
        ) -> np.ndarray:
            held.append(sum(alive() is not None for alive in opened))
            return super().images(prompts, seeds, plan)

    opened: list[weakref.ref[Heavy]] = []

    def load_one(*_: object) -> Heavy:
        heavy = Heavy()
        opened.append(weakref.ref(heavy))
        return heavy

    monkeypatch.setattr("sidcli.evaluation.candidates._drawer", load_one)
    found = [one for text in ("emoji", "emoji-teacher,steps=1") for one in resolve(ModelSpec.parse(text, None, None), 0, Silence())]
    evaluation = Evaluation(rules, to_measure(found, rules, 8, Drawing(CPU, 0, 8, None)), ["clip"], 8, Distributed(CPU))
    evaluation.fill(Silence())
    assert len(opened) == 2 and held == [1, 1]


def row(name: str, n: int = 400, **values: float) -> Row:
    return Row(name, "1 step", n, {metric: Measured(value, value - 1, value + 1) for metric, value in values.items()}, 0.5)


def real_row(**values: float) -> Row:
    return replace(row(REAL, **values), is_real=True)


def test_a_table_with_more_metrics_than_models_is_turned() -> None:
    header, cells = table([row("a", fid=3.0), row("b", fid=4.0)], ["fid"])
    assert header == ["model", "sampling", "n", "FID", "s/image"] and cells[1][3] == "4.00 ± 1.00"
    header, cells = table([row("a", fid=3.0, clip=0.5)], ["fid", "clip"])
    assert header == ["model", "a"] and ["CLIP score", "0.5000 ± 1.0000"] in cells
    assert table([row("a", fid=3.0), row("b")], ["fid"])[1][1][3] == "-"


def test_a_page_points_out_a_model_only_where_it_is_better_than_the_others_beyond_the_intervals() -> None:
    rules = emoji(NETWORKS)
    candidates = [Candidate(name, "", SceneSet(0), 10) for name in (REAL, "a", "b")]
    evaluation = Evaluation(rules, candidates, [], 10, Distributed(CPU))
    evaluation.metrics = ["kid", "noun", "clip"]
    rows = [real_row(kid=0, noun=9, clip=9), row("a", kid=10, noun=5, clip=5), row("b", kid=7, noun=6, clip=8)]
    scores = page(evaluation, rows, [(name, []) for name in (REAL, "a", "b")], 0).sections[0]
    assert isinstance(scores, Table)
    bold = {line[0].text: [cell.emphasis for cell in line[1:]] for line in scores.rows if any(cell.emphasis for cell in line)}
    assert bold == {"KID": [False, False, True], "CLIP score": [False, False, True]}


def test_the_latex_table_escapes_what_latex_would_read() -> None:
    text = latex([replace(row("50%_a&b", fid=3.0), sampling="1 step {x}", seconds_per_image=None)], ["fid"])
    assert r"50\%\_a\&b & 1 step \{x\} & 400 & 3.00 $\pm$ 1.00 \\" in text and text.startswith(r"\begin{tabular}{lrrr}")


def test_a_name_in_a_latex_table_is_printed_as_it_is_and_ends_neither_its_cell_nor_its_row() -> None:
    names = ["a|b", "<a>", "[1em]", "*", "a\x1b[0m\nb", "a\u202eb"]
    text = latex([replace(row(name, fid=3.0), sampling="1 step") for name in names], ["fid"])
    assert [line.partition(" & ")[0] for line in text.splitlines()[4:-2]] == [
        r"a\textbar{}b",
        r"\textless{}a\textgreater{}",
        "{}[1em]",
        "{}*",
        r"a\textbackslash{}u001b[0m\textbackslash{}u000ab",
        r"a\textbackslash{}u202eb",
    ]


def test_the_latex_table_bolds_the_best_printed_value_of_each_metric_among_models() -> None:
    rows = [
        real_row(fid=1.0, clip=0.9, noun=1.0),
        row("a", fid=2.004, clip=0.5, noun=0.96),
        row("b", fid=1.996, clip=0.7, noun=float("nan")),
        row("c", fid=2.02, clip=0.6, noun=0.9),
    ]
    assert re.findall(r"\\textbf{(.*?)} ", latex(rows, ["fid", "clip", "noun"])) == ["2.00", r"96.0 \%", "2.00", "0.7000"]
    downwards = latex(rows[:3], ["fid", "fid_teacher", "clip", "noun"])
    assert r"FID & 1.00 $\pm$ 1.00 & \textbf{2.00} $\pm$ 1.00 & \textbf{2.00} $\pm$ 1.00 \\" in downwards
    assert r"FID to teacher & - & - & - \\" in downwards
    assert "textbf" not in latex(rows[:2], ["fid"]), "one model alone is not the best"


def test_a_gate_names_every_model_and_number_beyond_it_and_leaves_real_scenes_alone() -> None:
    rows = [real_row(fid=99.0), row("mine", fid=31.25, clip=0.5), row("yours", fid=40.0)]
    assert beyond(rows, limits(["fid=41"], ["clip=0.4"])) == []
    assert beyond(rows, limits(["fid=30"], ["clip=0.6"])) == [
        "FID of mine (1 step) is 31.25, above 30",
        "FID of yours (1 step) is 40, above 30",
        "CLIP score of mine (1 step) is 0.5, below 0.6",
    ]
    assert len(beyond(rows, limits(["fid=30", "fid=35"], []))) == 3, "two bounds on one metric are two bounds"
    assert beyond([row("mine", fid=float("nan"))], limits(["fid=30"], [])) == ["FID of mine (1 step) is nan, above 30"]
    assert len(beyond([row(REAL, fid=40.0)], limits(["fid=30"], []))) == 1, "a folder may have this name"


def test_a_gate_asks_for_its_own_metric_and_is_refused_where_there_is_none() -> None:
    rules, one = emoji(NETWORKS), [Candidate(REAL, "", SceneSet(0), is_real=True), Candidate("s", "", SceneSet(1))]
    assert chosen(["clip"], rules, False, one, ["kid"]) == ["kid", "clip"]
    with pytest.raises(UsageError, match="FID to teacher needs a teacher in the table"):
        chosen(["clip"], rules, False, one, ["fid_teacher"])
    with pytest.raises(UsageError, match="composition needs a model in the table"):
        chosen(["clip"], rules, False, one, ["composition"])


def test_a_model_that_a_gate_says_nothing_about_is_named() -> None:
    rows = [row("t", fid=3.0), row("photos", clip=0.5)]
    assert not_applicable(rows, limits(["fid=9", "fid=8", "fid_teacher=3"], ["clip=0.1"])) == [
        "the gate on FID does not apply to photos (1 step), of which it is not measured",
        "the gate on CLIP score does not apply to t (1 step), of which it is not measured",
    ]


def test_more_images_than_captions_are_measured_as_far_as_the_captions_go(scenes_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "four.txt").write_text("a cat\na dog\na bus\na car\n")
    rules = custom(NETWORKS, None, tmp_path / "four.txt")
    candidates = to_measure(resolve(ModelSpec(str(scenes_folder)), 0, Silence()), rules, None, Drawing(CPU, 0, 10, None))
    assert chosen([], rules, False, candidates) == ["clip"]
    assert Evaluation(rules, candidates, [], None, Distributed(CPU)).counts == [4]
    measured = Evaluation(rules, candidates, [], 100, Distributed(CPU))
    assert measured.counts == [4] and measured.warnings([]) == [
        f"--num 100: {tmp_path / 'four.txt'} has only 4 captions",
        f"--num 100: {scenes_folder} has only 10 images",
    ]
    assert Evaluation(rules, candidates, [], 4, Distributed(CPU)).warnings([]) == []


def test_steps_of_all_teachers_leave_a_student_alone_and_its_own_must_be_possible() -> None:
    rules = emoji(NETWORKS)
    assert (
        to_measure(resolve(ModelSpec("emoji", 50), 0, Silence()), rules, 10, Drawing(CPU, 0, 10, None))[1].sampling
        == "1 step at t = 625"
    )
    with pytest.raises(UsageError, match="one-step model; --steps 4"):
        to_measure(resolve(ModelSpec("emoji", 4, stated=("steps",)), 0, Silence()), rules, 10, Drawing(CPU, 0, 10, None))


def test_images_of_bf16_are_stored_apart_from_those_of_fp32_and_the_table_names_their_precision() -> None:
    found = resolve(ModelSpec("emoji-teacher", 2), 0, Silence())
    rows = [to_measure(found, emoji(NETWORKS), 10, Drawing(CPU, 0, 10, None, one))[1] for one in ("fp32", "bf16")]
    assert [row.sampling for row in rows] == ["2 steps, guidance 3", "2 steps, guidance 3, bf16"]
    assert rows[0].images.key != rows[1].images.key


def test_bf16_on_a_cpu_without_instructions_for_it_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_units, count in ((True, 0), (False, 1)):
        monkeypatch.setattr(devices, "has_bf16_units", lambda has_units=has_units: has_units)
        heard = Listening()
        devices.warn_of_slow_bf16(CPU, "bf16", heard)
        devices.warn_of_slow_bf16(CPU, "fp32", heard)
        assert len(heard.said) == count and all("--precision fp32 is much faster" in note for note in heard.said)


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        (["emoji-teacher,steps=2"], {"steps": 3}, "--steps 3 has no effect: every model states its own steps"),
        (["emoji-teacher,steps=2", "emoji"], {"steps": 3}, "--steps 3 applies to teachers, and every teacher states its own steps"),
        (["emoji-teacher,guidance=2", "emoji"], {"guidance": 1.5}, "--guidance 1.5 applies to teachers, and every teacher states"),
        (["emoji"], {"guidance": 1.5}, "--guidance 1.5 applies to teachers, and none is measured"),
    ],
)
def test_a_setting_for_all_teachers_that_no_teacher_takes_is_refused(
    models: list[str], options: dict[str, float], said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        api.evaluate(models, ["accuracy"], num=2, listener=Silence(), **options)  # type: ignore[arg-type]


def test_a_setting_for_all_teachers_and_one_of_a_name_go_together() -> None:
    specs = ModelSpec.parse_all(["emoji-teacher,steps=2", "emoji-teacher"], 3, 1.5)
    assert [(spec.steps, spec.guidance) for spec in specs] == [(2, 1.5), (3, 1.5)]
    check_used([one for spec in specs for one in resolve(spec, 0, Silence())], 0)


def test_an_option_that_an_evaluation_does_not_use_is_noted(scenes_folder: Path, stand_ins: dict[str, Path]) -> None:
    def notes(models: object, metrics: list[str], **options: object) -> list[str]:
        listener = Listening()
        api.evaluate(models, metrics, num=8, listener=listener, **options)  # type: ignore[arg-type]
        return [text for text in listener.said if "has no effect" in text]

    files = {"inception": stand_ins["inception"], "clip_model": stand_ins["clip"], "cmmd_model": stand_ins["clip"]}
    files |= {"dino_model": stand_ins["dino"]}
    images = {"protocol": "custom", "reference": scenes_folder, "seed": 3, "image_folder": scenes_folder.parent / "kept"}
    dino = f"note: --dino-model {stand_ins['dino']} has no effect without --dino"
    assert notes(scenes_folder, ["prdc"], **files, **images) == [
        f"note: --clip-model {stand_ins['clip']} has no effect without --clip",
        f"note: --cmmd-model {stand_ins['clip']} has no effect without --cmmd",
        dino,
        f"note: --image-folder {scenes_folder.parent / 'kept'} has no effect: no model draws",
        "note: --seed 3 has no effect: no model draws",
    ]
    assert notes("emoji", ["cmmd"], clip_model=stand_ins["clip"], dino_model=stand_ins["dino"], seed=3) == [dino]
    both = sid("eval", "emoji", "--accuracy", "--num", "2", "--latex", "--json")
    assert "note: --latex has no effect with --json" in both.stderr.splitlines() and json.loads(both.stdout)
    (reference,) = notes("emoji", ["clip"], clip_model=stand_ins["clip"], reference=scenes_folder, prompts="prompts/nouns.txt")
    assert reference == f"note: --reference {scenes_folder} has no effect: no metric of this table compares with it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fud=3", "METRIC=VALUE, not"),
        *((text, "with a number, not") for text in ("fid", "fid=x", "fid=nan", "kid=inf", "noun=90%")),
    ],
)
def test_a_gate_that_is_not_a_metric_and_a_number_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--fail-above must be .*{said}"):
        limits([text], [])


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("noun=85", "noun is between 0 and 1", "noun=0.85"),
        ("clip=31.3", "CLIP score is between -1 and 1", "clip=0.313"),
        ("clip=-2", "CLIP score is between -1 and 1", ""),
        ("fid=-1", "FID is at least 0", ""),
    ],
)
def test_a_bound_that_the_metric_cannot_reach_is_refused_with_its_range(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"--fail-below {text}: {said}") as caught:
        limits([], [text])
    assert caught.value.hint == hint


@pytest.mark.parametrize("name", ["fd_dinov2", "dino", "FD-DINOv2", "fd-dinov2"])
def test_a_gate_takes_a_metric_by_its_option_its_key_and_its_label(name: str) -> None:
    assert limits([f"{name}=300"], []) == [Bound("fd_dinov2", True, 300.0)]


def test_every_option_asks_for_metrics_of_the_catalog_and_all_of_them_have_one() -> None:
    assert {metric for metrics in METRICS_OF_OPTION.values() for metric in metrics} == set(METRICS)


def test_what_a_protocol_cannot_give_is_left_out_of_all_and_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    rules = custom(NETWORKS, tmp_path / "some.npz", None)
    one = [Candidate("a", "", SceneSet(0))]
    assert chosen([], rules, True, one) == ["fid"]
    with pytest.raises(UsageError, match="KID needs a reference of images"):
        chosen(["kid"], rules, False, one)
    with pytest.raises(UsageError, match="CLIP score needs --prompts"):
        chosen(["clip"], rules, False, one)
    with pytest.raises(UsageError, match="noun needs the emoji world") as caught:
        chosen(["accuracy"], rules, False, one)
    assert caught.value.hint == "--fid, --fid-infinity"


def test_without_a_reference_what_needs_none_is_measured_on_built_in_captions() -> None:
    rules = custom(NETWORKS, None, None)
    assert rules.captions is not None and rules.captions.limit is None
    assert rules.captions.first(3) == listed(Path("general"), Silence()).first(3) and len(set(rules.captions.first(50))) > 40
    two = [Candidate("t", "", SceneSet(0), is_teacher=True), Candidate("s", "", SceneSet(1))]
    assert chosen([], rules, False, two) == chosen([], rules, True, two) == ["fid_teacher", "clip"]
    assert chosen(["fid"], rules, False, two) == ["fid_teacher"]
    assert Evaluation(rules, two, [], None, Distributed(CPU)).counts == [300, 300]
    with pytest.raises(UsageError, match="FID needs --reference FOLDER") as caught:
        chosen(["fid"], rules, False, two[1:])
    assert caught.value.hint == "--clip"


def test_the_teachers_images_are_compared_with_where_a_teacher_takes_part() -> None:
    rules = emoji(NETWORKS)
    two = [Candidate("t", "", SceneSet(0), is_teacher=True), Candidate("s", "", SceneSet(1))]
    real = Candidate(REAL, "", SceneSet(2), is_real=True)
    assert "fid_teacher" in chosen(["fid"], rules, False, [real, *two])
    assert "fid_teacher" not in chosen(["fid"], rules, False, [real, two[1]])
    evaluation = Evaluation(rules, two, ["fid_teacher"], 20, Distributed(CPU))
    evaluation.fill(Silence())
    teacher, student = evaluation.rows(Silence())
    assert "fid_teacher" not in teacher.metrics and student.metrics["fid_teacher"].value > 0


@pytest.mark.parametrize("few", ["drawn", "real"])
def test_each_metric_knows_how_many_images_it_needs_and_has_a_finite_value_of_so_many(few: str, stand_ins: dict[str, Path]) -> None:
    rules = emoji(Networks(CPU, Silence(), dino=str(stand_ins["dino"])))
    teacher = Candidate("t", "", SceneSet(5), held_out=SceneSet(6), bare=SceneSet(9), is_teacher=True)
    two = [teacher, Candidate("s", "", SceneSet(7), held_out=SceneSet(8), bare=SceneSet(10))]
    for metric in set(METRICS) - {*SUBJECTS_ONLY}:
        needed = {}
        for n in (1, 2, 3, 4, 5, 6, 20, 100):
            drawn, real = (n, 100) if few == "drawn" else (100, n)
            some = replace(rules, reference=Collection(SceneSet(world.REFERENCE_SEED), real))
            try:
                evaluation = Evaluation(some, two, [metric], drawn, Distributed(CPU))
            except UsageError as error:
                least = re.search(r"needs at least (\d+) images; (?:t|the reference) has", error.message)
                assert least is not None, error.message
                needed[n] = int(least[1])
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                evaluation.fill(Silence())
                value = evaluation.rows(Silence())[1].metrics[metric]
            assert np.isfinite([value.value, value.low, value.high]).all(), (metric, n)
        assert all(n < least <= 100 for n, least in needed.items()) and len(set(needed.values())) <= 1, metric


@dataclass(frozen=True)
class OfNouns(SceneSet):
    """Scenes of every noun in turn, which answer the bare captions; the last `wrong` scenes of 152 show the next noun."""

    wrong: int = 0

    @property
    def key(self) -> str:
        return f"nouns {self.wrong}"

    def read(self, indices: range, advance: object = None) -> list[np.ndarray]:
        nouns = world.NOUN_LIST
        shown = [nouns[(index + (index % len(nouns) >= len(nouns) - self.wrong)) % len(nouns)] for index in indices]
        return [world.render(world.Scene(noun, "white", 36, 14, 14, False, 1.0)) for noun in shown]


def test_bare_nouns_are_measured_on_images_of_prompts_of_a_noun_alone() -> None:
    asked = bare_captions(152)
    assert asked[:3] == [world.bare_caption(index) for index in range(3)] and len(set(asked)) == 152
    assert {"an apple", "a cat", "fries", "corn"} <= set(asked)
    models = [Candidate(str(wrong), "", SceneSet(1), bare=OfNouns(0, wrong=wrong)) for wrong in (0, 38)]
    folder = Candidate("folder", "", SceneSet(2))
    evaluation = Evaluation(emoji(NETWORKS), [*models, folder], ["bare_noun"], 4 * 152, Distributed(CPU))
    evaluation.fill(Silence())
    right, wrong, none = evaluation.rows(Silence())
    assert right.metrics["bare_noun"].value > 0.97 and abs(wrong.metrics["bare_noun"].value - 0.75) < 0.03
    assert "bare_noun" not in none.metrics
    assert chosen(["accuracy"], emoji(NETWORKS), False, models) == ["noun", "color", "bare_noun"]
    assert chosen(["accuracy"], emoji(NETWORKS), False, [folder]) == ["noun", "color"]


@pytest.mark.parametrize("color", ["black", "white"])
def test_images_that_are_all_alike_have_finite_values(color: str, tmp_path: Path) -> None:
    for index in range(30):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{index}.png")
    alike = FileSet(open_images(tmp_path))
    rules = emoji(NETWORKS)
    metrics = {*METRICS} - {"fid_teacher", "fid_infinity", "fd_dinov2", "composition", "bare_noun", *SUBJECTS_ONLY}
    references = (Collection(SceneSet(world.REFERENCE_SEED), 30), Collection(alike, 30))
    protocols = [(replace(rules, reference=reference), metrics) for reference in references]
    protocols.append((emoji_subjects(NETWORKS), {"identity", "subject_text", "clip_i", "copy", "diversity"}))
    for asked, names in protocols:
        candidate = Candidate("alike", "", alike, 30, repeated=alike)
        one = Evaluation(asked, [candidate], sorted(names), None, Distributed(CPU))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.fill(Silence())
            (found,) = one.rows(Silence())
        assert np.isfinite([[one.value, one.low, one.high] for one in found.metrics.values()]).all()


def test_few_images_and_rows_of_different_sizes_are_warned_of() -> None:
    evaluation = Evaluation(
        quick(), [Candidate("a", "", SceneSet(0)), Candidate("b", "", SceneSet(1), 20)], ["fid"], 30, Distributed(CPU)
    )
    evaluation.fill(Silence())
    different, biased = evaluation.warnings(evaluation.rows(Silence()))
    assert different == "rows of 20 and of 30 images: distances of different n do not compare"
    assert biased.startswith("FID is biased upwards at n = 20 (features of 128 dimensions): use --num 1280, or --fid-infinity")


def test_a_model_below_real_scenes_is_explained() -> None:
    evaluation = Evaluation(quick(), [Candidate("a", "", SceneSet(0))], ["fid"], 20, Distributed(CPU))
    evaluation.fill(Silence())
    rows = [real_row(fid=25.76), row("mine", fid=23.22), row("yours", fid=26.0)]
    assert evaluation.warnings(rows)[-1].startswith("FID of mine is below that of real scenes: at this n, bias")
    assert len(evaluation.warnings([rows[0], rows[2]])) == 1


def test_real_scenes_are_as_many_as_the_images_beside_them(scenes_folder: Path) -> None:
    rules = emoji(NETWORKS)
    candidates = to_measure(resolve(ModelSpec(str(scenes_folder)), 0, Silence()), rules, None, Drawing(CPU, 0, 10, None))
    assert Evaluation(rules, candidates, ["clip"], None, Distributed(CPU)).counts == [10, 10]


def test_what_is_named_twice_is_measured_once(scenes_folder: Path) -> None:
    found = [one for _ in range(2) for name in ("emoji", str(scenes_folder)) for one in resolve(ModelSpec(name), 0, Silence())]
    assert [one.name for one in to_measure(found, emoji(NETWORKS), 10, Drawing(CPU, 0, 10, None))] == [
        REAL,
        "emoji",
        str(scenes_folder),
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_images_of_other_prompts_than_the_captions_are_reported_before_and_beside_the_numbers(packed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    folder.mkdir()
    rules = emoji(NETWORKS)
    assert rules.captions is not None
    prompts = rules.captions.first(5)
    prompts[1], prompts[3] = "a red\x1b[31m dog " * 9, f" {prompts[3]}  "
    for index, prompt in enumerate([*prompts, None]):
        info = None if prompt is None else png_info(prompt, index, find("emoji"), Plan(1, grid=(625,)))
        Image.new("RGB", (64, 64)).save(folder / f"{index}.png", pnginfo=info)
    place = Path(shutil.make_archive(str(folder), "zip", folder)) if packed else folder
    candidates = to_measure(resolve(ModelSpec(str(place)), 0, Silence()), rules, None, Drawing(CPU, 0, 10, None))
    evaluation = Evaluation(rules, candidates, ["clip"], None, Distributed(CPU))
    listener = Listening()
    evaluation.fill(listener)
    (warning,) = evaluation.warnings([])
    assert warning.startswith(f"{place}: 1 of 5 images with a recorded prompt was made from another prompt than the caption")
    assert "for example 1.png: prompt 'a red" in warning and "..." in warning and "\x1b" not in warning
    assert listener.said == [], "nothing has to be drawn: the table follows at once"
    slow = Candidate("s", "", drawn_set(Painter(), 5))
    Evaluation(rules, [*candidates, slow], ["clip"], 5, Distributed(CPU)).fill(listener)
    assert listener.said == [f"note: {warning}"]


def test_the_protocol_is_chosen_by_what_is_measured_or_asked_for() -> None:
    assert choose("auto", True, set(), False) == "emoji" and choose("auto", True, set(), True) == "custom"
    assert choose("coco2014-30k", True, {True}, False) == "coco2014-30k"
    assert choose("auto", False, set(), False) == "custom" and choose("auto", False, {False}, True) == "custom"
    for name in ("auto", "custom"):
        with pytest.raises(UsageError, match="images need something to be compared with") as caught:
            choose(name, False, {True, False}, False)
        assert "sid eval FOLDER --reference OTHER_FOLDER" in caught.value.hint
    with pytest.raises(UsageError, match="--protocol must be one of"):
        check_protocol("coco")


def test_images_of_an_emoji_model_are_told_of_the_emoji_protocol(tmp_path: Path) -> None:
    card = tmp_path / "student" / "sid.json"
    card.parent.mkdir()
    card.write_text('{"world": "emoji"}')
    for number, model in enumerate(("embedded:emoji", str(card.parent), "hub:owner/name")):
        source = replace(find("emoji"), origin=model)
        folder = tmp_path / str(number)
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "0.png", pnginfo=png_info("a cat", 0, source, Plan(1, grid=(625,))))
        (found,) = resolve(ModelSpec(str(folder)), 0, Silence())
        assert found.is_emoji == (number < 2)
        with pytest.raises(UsageError) as caught:
            choose("auto", False, {found.is_emoji}, False)
        assert caught.value.hint.startswith("--protocol emoji" if found.is_emoji else "sid eval FOLDER --reference")
    with pytest.raises(UsageError, match="--prompts emoji: the captions of the emoji world") as caught:
        listed(Path("emoji"), Silence())
    assert caught.value.hint == "--protocol emoji"


def test_a_model_that_does_not_draw_emoji_is_refused_by_the_emoji_protocol(sd_folder: Path) -> None:
    with pytest.raises(InputError, match="does not draw the emoji world"):
        to_measure(resolve(ModelSpec(str(sd_folder)), 0, Silence()), emoji(NETWORKS), 10, Drawing(CPU, 0, 10, None))


def test_an_image_folder_is_read_in_the_order_of_its_numbers(scenes_folder: Path) -> None:
    (scenes_folder / "sheet.png").write_bytes((scenes_folder / "000000.png").read_bytes())
    images = FileSet(open_images(scenes_folder))
    assert len(images.files) == 10
    np.testing.assert_array_equal(images.read(range(3, 4))[0], world.render(world.scene(world.PROMPT_SEED, 3)))


def test_eval_measures_everything_draws_once_and_answers_from_its_cache(tmp_path: Path) -> None:
    asked = ["eval", "emoji-teacher,steps=2", "emoji", "--all", "--num", "24", "--report", "page.html", "--picture", "rows.png"]
    first = sid(*asked, "--untrained", "4", "--json", cwd=tmp_path, SID_CACHE_DIR=str(tmp_path / "c"))
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    rows = {(one["model"], one["sampling"]): one for one in result["models"]}
    assert list(rows) == [
        (REAL, "not drawn"),
        ("emoji-teacher", "2 steps, guidance 3"),
        ("emoji-teacher", "4 steps at t = 625, 468, 312, 156"),
        ("emoji", "1 step at t = 625"),
    ]
    student = rows["emoji", "1 step at t = 625"]["metrics"]
    assert set(student) == set(METRICS) - {"fid_infinity", "fd_dinov2", *SUBJECTS_ONLY}
    assert student["fid"]["low"] < student["fid"]["value"] < student["fid"]["high"]
    assert student["noun"]["value"] > 0.7 and student["composition"]["value"] > 0.3
    assert result["protocol"]["name"] == "emoji" and result["protocol"]["networks"]["features"].startswith("emoji classifier")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text and "emoji-teacher" in text and (tmp_path / "rows.png").is_file()
    assert all(one["seconds_per_image"] is not None for one in result["models"] if not one["is_real"])
    second = sid("eval", "emoji", "--fid", "--num", "24", cwd=tmp_path, SID_CACHE_DIR=str(tmp_path / "c"))
    assert "| FID " in second.stdout and "s/image" not in second.stdout, "nothing was drawn again"


def test_eval_fails_with_exit_code_5_beyond_a_gate_after_printing_its_table(tmp_path: Path) -> None:
    done = sid(
        "eval",
        "emoji",
        "--accuracy",
        "--num",
        "8",
        "--fail-below",
        "noun=1",
        "--fail-above",
        "noun=0",
        cwd=tmp_path,
        SID_CACHE_DIR=str(tmp_path / "c"),
    )
    assert done.returncode == 5 and "| noun" in done.stdout and "above 0" in done.stderr


def test_two_processes_measure_what_one_measures(tmp_path: Path) -> None:
    asked = ["eval", "emoji", "--accuracy", "--clip", "--num", "24", "--json"]
    one = sid(*asked, cwd=tmp_path, SID_CACHE_DIR=str(tmp_path / "one"))
    processes = together(2, *asked, cwd=tmp_path)
    (table, said), (nothing, _) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert nothing == "", "one process speaks"
    assert [row["metrics"] for row in json.loads(one.stdout)["models"]] == [row["metrics"] for row in json.loads(table)["models"]]


def test_processes_of_an_evaluation_are_started_and_their_exit_code_is_that_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(77)")
    done = sid("eval", "emoji", "--accuracy", "--processes", "2", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert done.returncode == 77 and done.stdout == "", done.stderr
