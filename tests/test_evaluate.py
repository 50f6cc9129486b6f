"""One pass over each set of images, kept and continued; tables, gates and errors of `sid eval`."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sidcli.emoji import world
from sidcli.entrants import FLOOR, Entrant, entrants, look_up
from sidcli.errors import InputError, UsageError
from sidcli.evaluate import beyond, latex, page, pictures, table
from sidcli.hub import Silence
from sidcli.imagefiles import open_images
from sidcli.imagesets import UNIT, Collection, DrawnSet, FileSet, SceneSet
from sidcli.metrics.catalogue import METRICS, Measured
from sidcli.parallel import Share, Team
from sidcli.progress import Progress, silent
from sidcli.protocols import Networks, choose, custom, emoji
from sidcli.report.page import Table, render
from sidcli.sampler import Plan
from sidcli.scores import ASKED, Evaluation, Row, chosen
from sidcli.sources import find
from sidcli.wishes import Wish, check_protocol, limits
from tests.test_cli import sid

CPU = torch.device("cpu")
NETWORKS = Networks(CPU, Silence())


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
    """Draws each seed as a grey of its own, and counts."""

    truncated = 0

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def images(self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent) -> torch.Tensor:
        self.drawn += seeds
        return torch.stack([torch.full((8, 8, 3), seed % 256, dtype=torch.uint8) for seed in seeds])


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
    assert images.seconds_per_image is not None


def test_progress_counts_parts_of_images_as_they_are_drawn_and_each_image_once() -> None:
    class Slow(Painter):
        def images(self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent) -> torch.Tensor:
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
    ("text", "wish"),
    [
        ("emoji", Wish("emoji", 50, None)),
        ("emoji-teacher,steps=10,guidance=1.5", Wish("emoji-teacher", 10, 1.5, own=True)),
        ("a/b@main,guidance=2", Wish("a/b@main", 50, 2.0, own=True)),
    ],
)
def test_a_model_may_say_how_it_is_to_draw(text: str, wish: Wish) -> None:
    assert Wish.parse(text, 50, None) == wish


@pytest.mark.parametrize("text", ["emoji,steps=x", "emoji,stops=2", "emoji,steps"])
def test_another_word_behind_a_comma_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither steps=N nor guidance=G"):
        Wish.parse(text, None, None)


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


def test_a_cut_line_among_the_times_is_passed_over() -> None:
    images = drawn_set(Painter(), 5)
    images.read(range(5))
    before = images.seconds_per_image
    with (images.folder / "times.jsonl").open("a") as times:
        times.write('{"images": 5, "sec')
    assert images.seconds_per_image == before


def test_images_left_out_by_the_rule_of_numbers_are_spoken_of(scenes_folder: Path) -> None:
    class Listening(Silence):
        said = ""

        def note(self, text: str) -> None:
            self.said += text

    Image.new("RGB", (8, 8)).save(scenes_folder / "cat.png")
    listener = Listening()
    look_up(Wish(str(scenes_folder)), 0, listener)
    assert listener.said.endswith("only the 10 images with numbers for names count, not the 1 others")


def test_a_path_with_a_comma_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    assert Wish.parse(str(tmp_path / "a,b"), None, None).name == str(tmp_path / "a,b")


@pytest.fixture
def scenes_folder(tmp_path: Path) -> Path:
    """Ten scenes as files, which answer the protocol's captions."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    for index in range(10):
        Image.fromarray(world.render(world.scene(world.PROMPT_SEED, index))).save(folder / f"{index:06d}.png")
    return folder


def test_a_folder_of_the_floors_own_scenes_gets_the_floors_numbers(scenes_folder: Path) -> None:
    rules = emoji(NETWORKS)
    found = look_up(Wish(str(scenes_folder)), 0, Silence())
    entered = entrants(found, rules, CPU, 10, 0, 10, None)
    evaluation = Evaluation(rules, entered, ["kid", "clip", "noun", "colour"], 10, Team(CPU))
    evaluation.fill(Silence())
    floor, ours = evaluation.rows(Silence())
    assert (floor.model, ours.n) == (FLOOR, 10)
    for metric in ("kid", "clip", "noun"):
        assert ours.metrics[metric].value == pytest.approx(floor.metrics[metric].value, abs=1e-6)
    assert ours.metrics["noun"].value >= 0.9 and ours.metrics["clip"].value > 0.8
    shown = pictures(evaluation)
    text = render(page(evaluation, [floor, ours], shown, 0))
    assert "scenes (floor)" in text and METRICS["kid"].meaning in text


def test_the_clip_score_falls_when_captions_are_shuffled() -> None:
    rules = emoji(NETWORKS)
    assert rules.captions is not None
    said = rules.captions.first(60)
    scores = []
    for captions in (said, said[1:] + said[:1]):
        collection = Collection(SceneSet(world.PROMPT_SEED), 60, captions)
        collection.fill([rules.judges.clip], Share(), silent)
        scores.append(collection.features(rules.judges.clip).mean())
    assert scores[0] > scores[1] + 0.3


def test_of_several_models_one_at_a_time_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rules, held = emoji(NETWORKS), []

    class Heavy(Painter):
        def images(self, prompts: Sequence[str], seeds: Sequence[int], plan: Plan, advance: Progress = silent) -> torch.Tensor:
            held.append(sum(alive() is not None for alive in opened))
            return super().images(prompts, seeds, plan)

    opened: list[weakref.ref[Heavy]] = []

    def load_one(*_: object) -> Heavy:
        heavy = Heavy()
        opened.append(weakref.ref(heavy))
        return heavy

    monkeypatch.setattr("sidcli.entrants._drawer", load_one)
    found = [one for text in ("emoji", "emoji-teacher,steps=1") for one in look_up(Wish.parse(text, None, None), 0, Silence())]
    evaluation = Evaluation(rules, entrants(found, rules, CPU, 8, 0, 8, None), ["clip"], 8, Team(CPU))
    evaluation.fill(Silence())
    assert len(opened) == 2 and held == [1, 1]


def row(name: str, n: int = 400, **values: float) -> Row:
    return Row(name, "1 step", n, {metric: Measured(value, value - 1, value + 1) for metric, value in values.items()}, 0.5)


def test_a_table_with_more_metrics_than_models_is_turned() -> None:
    header, cells = table([row("a", fid=3.0), row("b", fid=4.0)], ["fid"])
    assert header == ["model", "sampling", "n", "FID", "s/image"] and cells[1][3] == "4.00 ± 1.00"
    header, cells = table([row("a", fid=3.0, clip=0.5)], ["fid", "clip"])
    assert header == ["model", "a"] and ["CLIP score", "0.5000 ± 1.0000"] in cells
    assert table([row("a", fid=3.0), row("b")], ["fid"])[1][1][3] == "-"


def test_a_page_points_out_a_model_only_where_it_is_better_than_the_others_beyond_the_intervals() -> None:
    rules = emoji(NETWORKS)
    entered = [Entrant(name, "", SceneSet(0), 10) for name in (FLOOR, "a", "b")]
    evaluation = Evaluation(rules, entered, [], 10, Team(CPU))
    evaluation.metrics = ["kid", "noun", "clip"]
    rows = [row(FLOOR, kid=0, noun=9, clip=9), row("a", kid=10, noun=5, clip=5), row("b", kid=7, noun=6, clip=8)]
    scores = page(evaluation, rows, [(name, []) for name in (FLOOR, "a", "b")], 0).sections[0]
    assert isinstance(scores, Table)
    bold = {line[0].text: [cell.emphasis for cell in line[1:]] for line in scores.rows if any(cell.emphasis for cell in line)}
    assert bold == {"KID": [False, False, True], "CLIP score": [False, False, True]}


def test_the_latex_table_escapes_what_latex_would_read() -> None:
    text = latex(["model", "noun"], [["50%_a&b", "96.0 % ± 1.0 %"]])
    assert r"50\%\_a\&b & 96.0 \% $\pm$ 1.0 \% \\" in text and text.startswith(r"\begin{tabular}{lr}")


def test_a_gate_names_every_model_and_number_beyond_it_and_leaves_the_floor_alone() -> None:
    rows = [row(FLOOR, fid=99.0), row("mine", fid=31.25, clip=0.5), row("yours", fid=40.0)]
    assert beyond(rows, limits(["fid=41"], ["clip=0.4"])) == []
    assert beyond(rows, limits(["fid=30"], ["clip=0.6"])) == [
        "FID of mine (1 step) is 31.25, above 30",
        "FID of yours (1 step) is 40, above 30",
        "CLIP score of mine (1 step) is 0.5, below 0.6",
    ]
    assert len(beyond(rows, limits(["fid=30", "fid=35"], []))) == 3, "two bounds on one metric are two bounds"
    assert beyond([row("mine", fid=float("nan"))], limits(["fid=30"], [])) == ["FID of mine (1 step) is nan, above 30"]


def test_a_gate_asks_for_its_own_metric_and_is_refused_where_there_is_none() -> None:
    rules, one = emoji(NETWORKS), [Entrant(FLOOR, "", SceneSet(0)), Entrant("s", "", SceneSet(1))]
    assert chosen(["clip"], rules, False, one, ["kid"]) == ["kid", "clip"]
    with pytest.raises(UsageError, match="FID to teacher needs a teacher in the table"):
        chosen(["clip"], rules, False, one, ["fid_teacher"])


def test_more_images_than_captions_are_measured_as_far_as_the_captions_go(scenes_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "four.txt").write_text("a cat\na dog\na bus\na car\n")
    rules = custom(NETWORKS, None, tmp_path / "four.txt")
    entered = entrants(look_up(Wish(str(scenes_folder)), 0, Silence()), rules, CPU, None, 0, 10, None)
    assert chosen([], rules, False, entered) == ["clip"]
    assert Evaluation(rules, entered, [], None, Team(CPU)).counts == [4]


def test_steps_of_all_teachers_leave_a_student_alone_and_its_own_must_be_possible() -> None:
    rules = emoji(NETWORKS)
    assert entrants(look_up(Wish("emoji", 50), 0, Silence()), rules, CPU, 10, 0, 10, None)[1].sampling == "1 step at t = 625"
    with pytest.raises(UsageError, match="trained to draw in 1 steps at most, not 4"):
        entrants(look_up(Wish("emoji", 4, own=True), 0, Silence()), rules, CPU, 10, 0, 10, None)


@pytest.mark.parametrize("text", ["fid", "fud=3", "fid=x", "fid=nan", "noun=85"])
def test_a_gate_that_is_no_metric_and_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--fail-above (wants METRIC=VALUE|noun=85: noun is a share)"):
        limits([text], [])


def test_every_option_asks_for_metrics_of_the_catalogue_and_all_of_them_have_one() -> None:
    assert {metric for metrics in ASKED.values() for metric in metrics} == set(METRICS)


def test_what_a_protocol_cannot_give_is_left_out_of_all_and_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    rules = custom(NETWORKS, tmp_path / "some.npz", None)
    one = [Entrant("a", "", SceneSet(0))]
    assert chosen([], rules, True, one) == ["fid"]
    with pytest.raises(UsageError, match="KID needs a reference of images"):
        chosen(["kid"], rules, False, one)
    with pytest.raises(UsageError, match="CLIP score needs --prompts"):
        chosen(["clip"], rules, False, one)
    with pytest.raises(UsageError, match="colour needs the emoji world"):
        chosen(["accuracy"], rules, False, one)
    with pytest.raises(UsageError, match="nothing to measure"):
        chosen([], custom(NETWORKS, None, None), False, one)


def test_the_teachers_images_are_compared_with_where_a_teacher_takes_part() -> None:
    rules = emoji(NETWORKS)
    two = [Entrant("t", "", SceneSet(0), is_teacher=True), Entrant("s", "", SceneSet(1))]
    assert "fid_teacher" in chosen(["fid"], rules, False, [Entrant(FLOOR, "", SceneSet(2)), *two])
    assert "fid_teacher" not in chosen(["fid"], rules, False, [Entrant(FLOOR, "", SceneSet(2)), two[1]])
    evaluation = Evaluation(rules, two, ["fid_teacher"], 20, Team(CPU))
    evaluation.fill(Silence())
    teacher, student = evaluation.rows(Silence())
    assert "fid_teacher" not in teacher.metrics and student.metrics["fid_teacher"].value > 0


def test_too_few_images_for_a_metric_are_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="precision has no value with 5 images of a"):
        Evaluation(emoji(NETWORKS), [Entrant("a", "", SceneSet(0))], ["precision"], 5, Team(CPU))


def test_few_images_and_rows_of_different_sizes_are_warned_of() -> None:
    evaluation = Evaluation(
        emoji(NETWORKS), [Entrant("a", "", SceneSet(0)), Entrant("b", "", SceneSet(1), 10)], ["fid"], 20, Team(CPU)
    )
    evaluation.fill(Silence())
    different, biased = evaluation.warnings()
    assert different == "rows of 10 and of 20 images: distances of different n do not compare"
    assert biased.startswith("FID of 10 images in 128 dimensions is too high by a bias; --num 1280")


def test_the_protocol_is_chosen_by_what_is_measured_or_asked_for() -> None:
    assert choose("auto", True, False) == "emoji" and choose("auto", True, True) == "custom"
    assert choose("coco2014-30k", True, False) == "coco2014-30k"
    with pytest.raises(UsageError, match="nothing to compare these images with"):
        choose("auto", False, False)
    with pytest.raises(UsageError, match="--protocol must be one of"):
        check_protocol("coco")


def test_a_model_that_does_not_draw_emoji_is_refused_by_the_emoji_protocol(sd_folder: Path) -> None:
    with pytest.raises(InputError, match="does not draw the emoji world"):
        entrants(look_up(Wish(str(sd_folder)), 0, Silence()), emoji(NETWORKS), CPU, 10, 0, 10, None)


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
        (FLOOR, "real"),
        ("emoji-teacher", "2 steps, guidance 3"),
        ("emoji-teacher", "4 steps at t = 625, 468, 312, 156"),
        ("emoji", "1 step at t = 625"),
    ]
    student = rows["emoji", "1 step at t = 625"]["metrics"]
    assert set(student) == set(METRICS) - {"fid_infinity", "fd_dinov2"}
    assert student["fid"]["low"] < student["fid"]["value"] < student["fid"]["high"]
    assert student["noun"]["value"] > 0.7 and student["composition"]["value"] > 0.3
    assert result["protocol"]["name"] == "emoji" and result["protocol"]["networks"]["features"].startswith("emoji classifier")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text and "emoji-teacher" in text and (tmp_path / "rows.png").is_file()
    times = sorted((tmp_path / "c").rglob("times.jsonl"))
    before = [file.read_text() for file in times]
    second = sid("eval", "emoji", "--fid", "--num", "24", cwd=tmp_path, SID_CACHE_DIR=str(tmp_path / "c"))
    assert "| FID " in second.stdout and [file.read_text() for file in times] == before


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
    asked = ["eval", "emoji", "--accuracy", "--clip", "--num", "120", "--json"]
    one = sid(*asked, cwd=tmp_path, SID_CACHE_DIR=str(tmp_path / "one"))
    two = sid(*asked, "--processes", "2", cwd=tmp_path, SID_CACHE_DIR=str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert [row["metrics"] for row in json.loads(one.stdout)["models"]] == [
        row["metrics"] for row in json.loads(two.stdout)["models"]
    ]
