"""Ids of the hub, against a hub on this machine."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sidcli.cli import main
from sidcli.errors import InputError
from sidcli.formats.diffusers_folder import save_tokenizer
from sidcli.models.families import clip_tokenizer
from sidcli.models.hub import check_weights, is_complete, required_files
from tests import REPOSITORY
from tests.commands import from_server as sid
from tests.commands import in_server
from tests.hub_server import COMMIT, Hub, Trouble
from tests.namespaces import leave_network, skip_without

STALE = ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "pipeline.py")


@pytest.fixture(scope="module")
def repository(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as hubs have them: with half-precision twins, pickles and code beside what is wanted."""
    folder = tmp_path_factory.mktemp("hub") / "sd"
    shutil.copytree(sd_folder, folder)
    for name in STALE:
        (folder / name).write_text("not to be fetched")
    return folder


def environment(hub: Hub, home: Path, offline: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"}


FETCH = """
import sys
from sidcli.cli.console import Console
from sidcli.errors import SidError
from sidcli.models.hub import fetch
try:
    print(fetch(sys.argv[1], Console()).folder)
except SidError as error:
    Console().error(error)
    sys.exit(error.exit_code)
"""


def fetch(hub: Hub, home: Path, model: str, offline: str = "0", **more: str) -> subprocess.CompletedProcess[str]:
    """A download in a process of its own: the hub's library reads its settings when it is imported. Commands run in forks that read them
    again."""
    env = os.environ | environment(hub, home, offline) | more
    return subprocess.run([sys.executable, "-c", FETCH, model], capture_output=True, text=True, env=env)


def test_a_dry_run_fetches_descriptions_and_lists_the_rest_and_sampling_fetches_it_once(repository: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with Hub({"someone/sd": repository}).running() as hub:
        planned = sid("distill", "--teacher", "someone/sd", "--dry-run", "--json", cwd=tmp_path, **environment(hub, home, "0"))
        assert planned.returncode == 0, planned.stderr
        listed = json.loads(planned.stdout)["downloads"]
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert listed[weights] == (repository / weights).stat().st_size and len(listed) == 3
        assert not any(".safetensors" in request for request in hub.requests if request.startswith("GET"))
        half = fetch(hub, home, "someone/sd", offline="1")
        assert half.returncode == 3 and "the cache has no complete copy" in half.stderr, "half a cache is no model"
        sampled = ("sample", "a cat", "--steps", "1", "--model", "someone/sd", "-o", "cat.png")
        drawn = sid(*sampled, cwd=tmp_path, **environment(hub, home, "0"))
        assert drawn.returncode == 0 and "downloading someone/sd: 3 files" in drawn.stderr, drawn.stderr
        assert not any(name in request for request in hub.requests for name in STALE)
        count = len(hub.requests)
        again = fetch(hub, home, "someone/sd")
        assert again.returncode == 0 and f"commit {COMMIT[:12]}" in again.stderr
        assert len(hub.requests) == count, "a full cache asks nobody"


@pytest.mark.parametrize(
    "lost",
    [
        ("unet/config.json",),
        ("vae/diffusion_pytorch_model.safetensors",),
        ("text_encoder/model.safetensors",),
        ("scheduler/scheduler_config.json",),
        ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
        ("tokenizer/tokenizer.json", "tokenizer/merges.txt"),
        ("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"),
    ],
)
def test_a_copy_in_the_cache_without_a_part_is_not_complete(lost: tuple[str, ...], sd_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd_folder, tmp_path / "copy"))
    save_tokenizer(clip_tokenizer(), copy / "tokenizer")
    assert is_complete(copy)
    for name in lost:
        (copy / name).unlink()
    assert not is_complete(copy)
    if len(lost) == 4:
        (copy / "tokenizer").rmdir()
        assert not is_complete(copy)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_copy_in_the_cache_without_a_shard_is_not_complete(variant: str, sd_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sd_folder, tmp_path / "copy"))
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    shards = [f"diffusion_pytorch_model{variant}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        shutil.copyfile(weights, weights.with_name(shard))
    weights.unlink()
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    weights.with_name(f"diffusion_pytorch_model.safetensors.index{variant}.json").write_text(json.dumps(index))
    assert is_complete(copy)
    weights.with_name(shards[1]).unlink()
    assert not is_complete(copy)


def test_of_several_variants_the_plain_one_is_read_then_full_precision_then_half() -> None:
    files = [f"unet/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp32", ".fp16", ".bf16", ".non_ema")]
    for first in range(4):
        assert required_files(files[first:]) == [files[first]]
    assert (
        required_files(files[4:])
        == required_files(["unet/model.safetensors", "text_encoder/diffusion_pytorch_model.safetensors"])
        == []
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["model.non_ema.safetensors", "model.int8.safetensors"],
            "text_encoder has only the variant int8 and non_ema of its weights",
        ),
        (["pytorch_model.bin", "config.json"], "text_encoder has no weights in safetensors, only pytorch_model.bin: a pickle"),
        (["config.json", "diffusion_pytorch_model.safetensors"], "text_encoder has no weights in safetensors"),
    ],
)
def test_weights_that_are_not_read_are_named(files: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_weights("text_encoder", "text_encoder", files)
    check_weights("text_encoder", "text_encoder", [*files, "model.bf16.safetensors"])


def test_a_repository_without_weights_that_are_read_is_refused_before_a_download(repository: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(repository, tmp_path / "other"))
    (other / "vae" / "diffusion_pytorch_model.safetensors").rename(other / "vae" / "diffusion_pytorch_model.non_ema.safetensors")
    with Hub({"someone/sd": other}).running() as hub:
        refused = fetch(hub, tmp_path / "home", "someone/sd")
        assert refused.returncode == 3 and "someone/sd: vae has only the variant non_ema" in refused.stderr, refused.stderr
        assert not any("/resolve/" in request for request in hub.requests)
        for impossible in ("a--b/c", "someone/-x", "someone/" + "x" * 100):
            refused = fetch(hub, tmp_path / "home", impossible)
            assert refused.returncode == 3 and "is not a valid hub id" in refused.stderr, refused.stderr


def test_an_id_that_left_the_hub_is_found_under_its_new_name_and_the_old_one_in_the_cache(repository: Path, tmp_path: Path) -> None:
    new = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    with Hub({new: repository}).running() as hub:
        drawn = fetch(hub, tmp_path / "home", "runwayml/stable-diffusion-v1-5@main")
        assert drawn.returncode == 0 and f"using {new}" in drawn.stderr, drawn.stderr
    with Hub({"runwayml/stable-diffusion-v1-5": repository}).running() as hub:
        home = tmp_path / "home"
        for folder in (home / "hub").glob("models--*"):
            folder.rename(folder.with_name("models--runwayml--stable-diffusion-v1-5"))
        kept = fetch(hub, home, "runwayml/stable-diffusion-v1-5", offline="1")
        assert kept.returncode == 0 and "has left the hub" not in kept.stderr, kept.stderr
        assert hub.requests == []


@pytest.mark.check(16)
def test_a_cut_connection_goes_on_where_it_was_cut(repository: Path, tmp_path: Path) -> None:
    with Hub({"someone/sd": repository}, cut_after=50_000).running() as hub:
        drawn = fetch(hub, tmp_path / "home", "someone/sd")
        assert drawn.returncode == 0, drawn.stderr
        assert "diffusion_pytorch_model.safetensors" in hub.cuts


@pytest.mark.check(16)
@pytest.mark.parametrize(
    ("hub", "model", "said"),
    [
        (Hub({}), "someone/sd", "the hub has no model someone/sd"),
        (Hub({"someone/sd": Path()}, token="secret"), "someone/sd", "HF_TOKEN if it is private"),
        (Hub({"someone/sd": Path()}), "someone/sd@v9", "has no revision 'v9'"),
        (Hub({"someone/sd": REPOSITORY / "tests" / "benchmarks"}), "someone/sd", "no model_index.json"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_exit_3(hub: Hub, model: str, said: str, tmp_path: Path) -> None:
    with hub.running():
        refused = fetch(hub, tmp_path / "home", model)
    assert refused.returncode == 3 and "Traceback" not in refused.stderr, refused.stderr
    assert said in refused.stderr.splitlines()[-1]


def test_a_gated_model_says_so_and_a_token_opens_a_private_one(repository: Path, tmp_path: Path) -> None:
    with Hub({"someone/sd": repository}, gated=True).running() as hub:
        refused = fetch(hub, tmp_path / "home", "someone/sd")
        assert refused.returncode == 3 and "accept its terms" in refused.stderr.splitlines()[-1], refused.stderr
    with Hub({"someone/sd": repository}, token="hf_secret").running() as hub:
        drawn = fetch(hub, tmp_path / "home", "someone/sd", HF_TOKEN="hf_secret")
        assert drawn.returncode == 0, drawn.stderr
        assert "hf_secret" not in drawn.stderr


def test_an_upload_makes_a_private_repository_and_sends_every_file(tmp_path: Path) -> None:
    exported = ("export", "emoji", "--dtype", "fp16", "-o", "student", "--push-to-hub", "someone/new", "--json")
    with Hub({}, token="hf_secret").running() as hub:
        settings = environment(hub, tmp_path / "home", "0")
        done = sid(*exported, cwd=tmp_path, HF_TOKEN="hf_secret", **settings)
        assert done.returncode == 0, done.stderr
        assert hub.created[0]["visibility"] == "private" and "hf_secret" not in done.stderr
        assert set(hub.committed) == set(json.loads(done.stdout)["files"])
        unet = (tmp_path / "student" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        assert hub.objects[hashlib.sha256(unet).hexdigest()] == unet
        refused = sid(*exported, "--overwrite", cwd=tmp_path, HF_TOKEN="wrong", **settings)
        assert refused.returncode == 3 and "HF_TOKEN" in refused.stderr.splitlines()[-1], refused.stderr


UNET = "unet/diffusion_pytorch_model.safetensors"
INFO = "models/someone/sd"


@pytest.mark.check(16)
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({INFO: [500], UNET: [503, 502]}, None),
        ({UNET: ["stall"]}, None),
        ({INFO: [500] * 99}, "500 Internal Server Error"),
        ({UNET: [500] * 99}, "500 Internal Server Error"),
        ({UNET: ["short"]}, "has size 24"),
        ({UNET: [404]}, "404"),
        ({INFO: [403]}, "403"),
    ],
    ids=["errors once", "stall", "errors of the list", "errors of a file", "wrong length", "file gone", "forbidden"],
)
def test_a_hub_in_trouble_is_asked_a_few_times_and_what_arrived_is_not_asked_for_again(
    trouble: dict[str, list[Trouble]], said: str | None, repository: Path, tmp_path: Path
) -> None:
    wanted = required_files(sorted(str(file.relative_to(repository)) for file in repository.rglob("*")))
    with Hub({"someone/sd": repository}, troubles=trouble).running() as hub:
        first = fetch(hub, tmp_path, "someone/sd", HF_HUB_DOWNLOAD_TIMEOUT="1")
        arrived = {file for file in wanted if any((tmp_path / "hub").glob(f"models--*/snapshots/*/{file}"))}
        if said is None:
            assert first.returncode == 0 and arrived == set(wanted), first.stderr
        else:
            last = first.stderr.splitlines()[-1]
            assert first.returncode == 3 and "someone/sd" in last and said in last, first.stderr
            assert UNET not in arrived and "Traceback" not in first.stderr
        assert max(hub.requests.count(request) for request in hub.requests) <= 3, hub.requests
        hub.troubles.clear()
        hub.requests.clear()
        second = fetch(hub, tmp_path, "someone/sd")
        assert second.returncode == 0, second.stderr
        fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
        assert len(fetched) == len(wanted) - len(arrived)
    (whole,) = (tmp_path / "hub").glob(f"models--*/snapshots/*/{UNET}")
    assert whole.read_bytes() == (repository / UNET).read_bytes()
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def watched(commands: list[list[str]], cwd: Path, network: bool) -> None:
    """Several commands in one process that says whenever it asks for a name or a connection, and how each command ended."""
    if not network:
        leave_network()
    os.chdir(cwd)
    asking = ("socket.connect", "socket.getaddrinfo", "socket.sendto")
    sys.addaudithook(lambda event, given: print("ASKED", event, given[1:], file=sys.stderr) if event in asking else None)
    for arguments in commands:
        sys.argv = ["sid", *arguments]
        try:
            main()
        except SystemExit as end:
            print("ENDED", end.code or 0, file=sys.stderr, flush=True)


@pytest.mark.check(15)
def test_a_model_in_the_cache_works_without_a_network_and_nobody_is_asked(repository: Path, tmp_path: Path) -> None:
    skip_without("-Urn")
    home = tmp_path / "home"
    with Hub({"someone/sd": repository}).running() as hub:
        assert fetch(hub, home, "someone/sd").returncode == 0
    train = ["distill", "--teacher", "someone/sd", "--steps", "1", "--batch-size", "8", "-o", "run", "--device", "cpu"]
    commands = [
        ["sample", "a cat", "--steps", "1", "--model", "someone/sd", "-o", "teacher.png"],
        train,
        ["sample", "a cat", "--model", "run", "-o", "student.png"],
        ["export", "run", "-o", "exported"],
        ["sample", "a cat", "--model", "me/mine", "-o", "other.png"],
    ]
    done = in_server(watched, commands, tmp_path, False, HF_HOME=str(home), HF_HUB_OFFLINE="0")
    *cached, missing = re.findall(r"(.*?ENDED \d+)\n", done.stderr, re.DOTALL)
    assert [said.split()[-1] for said in cached] == ["0"] * 4, cached
    assert "ASKED" not in "".join(cached)
    assert missing.endswith("ENDED 3") and 1 <= missing.count("ASKED") <= 3, missing
    error = next(line for line in missing.splitlines() if line.startswith("error: "))
    assert "me/mine" in error and "the cache has no complete copy" in error and "Traceback" not in missing


@pytest.mark.check(15)
def test_offline_by_wish_asks_nobody(repository: Path, tmp_path: Path) -> None:
    with Hub({"someone/sd": repository}).running() as hub:
        refused = fetch(hub, tmp_path, "someone/sd", offline="1")
        assert refused.returncode == 3 and len(refused.stderr.splitlines()) == 1 and "someone/sd" in refused.stderr
        assert hub.requests == []


TOKEN = "hf_VeRySeCrEtToKeN0123456789"


@pytest.mark.check(31)
def test_a_token_opens_the_hub_and_is_written_and_shown_nowhere(repository: Path, tmp_path: Path) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    train = ["distill", "--teacher", "someone/sd", "--steps", "1", "--batch-size", "8", "-o", "run", "--device", "cpu"]
    commands = [
        train,
        ["sample", "a cat", "--model", "run", "-o", "cat.png", "--json"],
        ["export", "run", "-o", "exported", "--json"],
    ]
    commands.append(["sample", "a cat", "--model", "someone/other"])
    with Hub({"someone/sd": repository}, token=TOKEN, troubles={"models/someone/other": [500] * 99}).running() as hub:
        settings = environment(hub, home, "0") | {"HF_TOKEN": TOKEN, "SID_DEBUG": "1"}
        done = in_server(watched, commands, here, True, **settings)
        assert re.findall(r"ENDED (\d+)", done.stderr) == ["0", "0", "0", "3"], done.stderr
        assert "Traceback" in done.stderr and TOKEN not in done.stdout + done.stderr
        hub.token = "another"
        refused = fetch(hub, tmp_path / "empty", "someone/sd", HF_TOKEN=TOKEN)
        assert refused.returncode == 3 and "HF_TOKEN" in refused.stderr and TOKEN not in refused.stderr
    written = [file for folder in (here, home) for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in written}
    assert {"run.json", "config.toml", "manifest.json", "sid.json", "README.md", "cat.png", "report.html"} <= names
    assert [file for file in written if TOKEN.encode() in file.read_bytes()] == []
