import inspect
import json
import resource
import shutil
import signal
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidcli.errors import EnvironmentProblem, InputError
from sidcli.formats import comfyui
from sidcli.models import families, ldm, single_file
from sidcli.models.families import FAMILIES, build, clip_tokenizer, describe
from sidcli.models.loading import load
from sidcli.models.single_file import read, write
from sidcli.models.sources import find
from tests import tiny, tiny_families

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TO_K = "transformer_blocks.0.attn2.to_k.weight"
PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny pipelines whose tensors all differ, zeros and ones included: a swap of two names must show."""
    root = tmp_path_factory.mktemp("folders")
    written = {
        "sd1": tiny.write_sd(root / "sd1"),
        "sd2": tiny_families.write_sd2(root / "sd2"),
        "sdxl": tiny_families.write_sdxl(root / "sdxl"),
    }
    for family, folder in written.items():
        pipe = PIPELINES[family].from_pretrained(folder)
        generator = torch.Generator().manual_seed(1)
        for network in networks(pipe).values():
            for parameter in network.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        pipe.save_pretrained(folder)
    return written


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> dict[str, Any]:
    return {family: PIPELINES[family].from_pretrained(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def files(pipes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    return {family: save(root / f"{family}.safetensors", pipe) for family, pipe in pipes.items()}


def networks(pipe: Any) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in COMPONENTS if hasattr(pipe, name)}


def save(path: Path, pipe: Any, metadata: dict[str, str] | None = None, dtype: torch.dtype = torch.float32) -> Path:
    write(path, networks(pipe), pipe.scheduler.config, metadata or {}, dtype)
    return path


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def changed(
    source: Path,
    target: Path,
    drop: Iterable[str] = (),
    add: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """The file of another program: without our header, unless `metadata` gives one, and without the tensors that begin with `drop`."""
    tensors = {name: value for name, value in load_file(source).items() if not name.startswith(tuple(drop))}
    save_file(tensors | (add or {}), target, metadata)
    return target


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **options)
    return f"{caught.value.message} -> {caught.value.hint}"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back_bit_for_bit_into_fresh_networks(
    family: str, pipes: dict[str, Any], files: dict[str, Path]
) -> None:
    found = read(files[family])
    assert found.family == family
    assert found.scheduler_config["prediction_type"] == pipes[family].scheduler.config.prediction_type
    assert set(found.configs) == set(networks(pipes[family]))
    for name, network in networks(pipes[family]).items():
        fresh = build(name, found.configs[name])
        tensors = found.tensors(name)
        fresh.load_state_dict(tensors, strict=True)
        assert equal(fresh.state_dict(), network.state_dict())
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_reads_the_file_bit_for_bit(
    family: str, pipes: dict[str, Any], files: dict[str, Path], folders: dict[str, Path]
) -> None:
    theirs = PIPELINES[family].from_single_file(files[family], config=str(folders[family]), local_files_only=True)
    for name, network in networks(pipes[family]).items():
        assert equal(getattr(theirs, name).state_dict(), network.state_dict()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_another_program_is_read_by_a_folder_of_descriptions(
    family: str, pipes: dict[str, Any], files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    bare = changed(files[family], tmp_path / "bare.safetensors", drop=["v_pred"])
    found = read(bare, config=folders[family])
    for name, network in networks(pipes[family]).items():
        assert equal(found.tensors(name), network.state_dict())
    assert found.scheduler_config["prediction_type"] == pipes[family].scheduler.config.prediction_type


def test_the_shipped_student_survives_in_half_precision(tmp_path: Path) -> None:
    model = load(find("emoji"))
    parts = {"unet": model.denoiser, "vae": model.vae, "text_encoder": model.text_encoders[0]}
    write(tmp_path / "emoji.safetensors", parts, model.scheduler_config, {"sid.t_init": "625"}, torch.float16)
    found = read(tmp_path / "emoji.safetensors")
    for name, network in parts.items():
        tensors = found.tensors(name)
        assert equal(tensors, {key: value.half() for key, value in network.state_dict().items()})
    assert found.metadata["sid.t_init"] == "625"
    assert found.scheduler_config["_class_name"] == "EulerDiscreteScheduler"


def test_text_encoders_of_older_transformers_get_the_same_names(pipes: dict[str, Any], files: dict[str, Path]) -> None:
    class Wrapped(nn.Module):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.text_model, self.config = network, network.config

    for family in ("sd1", "sd2"):
        text = pipes[family].text_encoder
        new, old = (single_file.file_tensors(family, "text_encoder", network, torch.float32) for network in (text, Wrapped(text)))
        assert equal(new, old)
        assert set(new) <= set(load_file(files[family]))


def test_open_clip_itself_reads_the_second_text_encoder_and_computes_the_same(
    pipes: dict[str, Any], files: dict[str, Path]
) -> None:
    prefix = "conditioner.embedders.1.model."
    text = {"context_length": 77, "vocab_size": families.WORDS, "width": 24, "heads": 2, "layers": 2, "mlp_ratio": 2.0}
    vision = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}
    theirs = open_clip.CLIP(embed_dim=20, vision_cfg=vision, text_cfg=text).eval()
    tensors = {name.removeprefix(prefix): value for name, value in load_file(files["sdxl"]).items() if name.startswith(prefix)}
    outcome = theirs.load_state_dict(tensors, strict=False)
    assert not outcome.unexpected_keys
    assert all(name == "logit_scale" or name.startswith("visual.") for name in outcome.missing_keys)
    ids = clip_tokenizer("!")(["a photo of a cat", "sky"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_text(ids), pipes["sdxl"].text_encoder_2(ids).text_embeds, rtol=1e-4, atol=1e-4)


def test_text_encoders_are_found_under_the_prefixes_of_other_programs(
    pipes: dict[str, Any], files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    for family in ("sd1", "sd2"):
        written, met = ldm.PREFIXES[family]["text_encoder"]
        tensors = {name.replace(written, met): value for name, value in load_file(files[family]).items()}
        path = tmp_path / f"{family}.safetensors"
        save_file(tensors, path)
        assert equal(read(path, config=folders[family]).tensors("text_encoder"), pipes[family].text_encoder.state_dict())


def test_the_last_layer_of_openclip_is_ignored_and_vae_attention_may_be_matrices(
    pipes: dict[str, Any], files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    layer = "cond_stage_model.model.transformer.resblocks."
    tensors = load_file(files["sd2"])
    spare = {name.replace(f"{layer}1.", f"{layer}2."): value for name, value in tensors.items() if name.startswith(f"{layer}1.")}
    flat = {name: value.flatten(1) for name, value in tensors.items() if ".mid.attn_1." in name and value.ndim == 4}
    assert len(spare) == 12 and len(flat) == 8
    path = changed(
        files["sd2"], tmp_path / "more.safetensors", add={**spare, **flat, "cond_stage_model.model.logit_scale": torch.ones(())}
    )
    found = read(path, config=folders["sd2"])
    assert equal(found.tensors("text_encoder"), pipes["sd2"].text_encoder.state_dict())
    assert equal(found.tensors("vae"), pipes["sd2"].vae.state_dict())


# what a file says about itself


def test_the_header_describes_the_model_to_other_programs(files: dict[str, Path]) -> None:
    found = {family: header(path) for family, path in files.items()}
    names = {family: content["modelspec.architecture"] for family, content in found.items()}
    assert names == {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}
    assert {family: content["modelspec.prediction_type"] for family, content in found.items()} == {
        "sd1": "epsilon",
        "sd2": "v",
        "sdxl": "epsilon",
    }
    assert {content["modelspec.resolution"] for content in found.values()} == {"64x64"}
    assert {content["modelspec.sai_model_spec"] for content in found.values()} == {"1.0.0"}
    assert not any("_name_or_path" in content["sid.config"] for content in found.values())
    assert {family: "v_pred" in load_file(path) for family, path in files.items()} == {"sd1": False, "sd2": True, "sdxl": False}


def test_given_metadata_joins_the_header_and_replaces_its_entries(pipes: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", pipes["sd1"], {"modelspec.title": "Mine", "sid.card": "{}"})
    assert header(path)["modelspec.title"] == "Mine"
    assert read(path).metadata["sid.card"] == "{}"


def test_the_header_tells_width_before_height(pipes: dict[str, Any], tmp_path: Path) -> None:
    unet = build("unet", {**pipes["sd1"].unet.config, "sample_size": [4, 8]})
    scheduler = pipes["sd1"].scheduler.config
    write(tmp_path / "a.safetensors", networks(pipes["sd1"]) | {"unet": unet}, scheduler, {}, torch.float32)
    assert header(tmp_path / "a.safetensors")["modelspec.resolution"] == "64x32"
    assert read(tmp_path / "a.safetensors").configs["unet"]["sample_size"] == [4, 8]


@cache
def shapes(family: str) -> dict[str, list[int]]:
    """The tensors of a published file."""
    found = {}
    for component, config in FAMILIES[family].components.items():
        with torch.device("meta"):
            network = build(component, config)
        places = single_file.places_in_file(family, component, network, ldm.PREFIXES[family][component][0])
        found |= {places[name].key: places[name].shape(tensor.shape) for name, tensor in network.state_dict().items()}
    return found


def full(family: str, path: Path, markers: Iterable[str] = (), metadata: dict[str, str] | None = None, drop: str = "-") -> Path:
    """A file of full size as published: its header, and a hole on the disk for the content."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in (shapes(family) | {marker: [0] for marker in markers}).items():
        if not name.startswith(drop):
            begin, end = end, end + 2 * torch.Size(shape).numel()
            entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
    return path


def test_published_models_are_recognized_by_their_tensors(tmp_path: Path) -> None:
    for family in FAMILIES:
        found = read(full(family, tmp_path / f"{family}.safetensors"), prediction="epsilon")
        assert (found.family, found.configs) == (family, FAMILIES[family].components)


def test_stock_diffusers_takes_written_files_of_full_size_for_what_they_are() -> None:
    kinds = {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}
    for family, kind in kinds.items():
        assert (
            infer_diffusers_model_type({name: torch.empty(shape, device="meta") for name, shape in shapes(family).items()}) == kind
        )


def test_stable_diffusion_1_and_xl_predict_epsilon_unless_the_file_says_v(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def prediction(family: str, *markers: str, **metadata: str) -> str:
        content = {f"modelspec.{key}": value for key, value in metadata.items()}
        return read(full(family, path, markers, content)).scheduler_config["prediction_type"]

    assert prediction("sd1") == prediction("sdxl") == "epsilon"
    assert prediction("sdxl", "v_pred") == "v_prediction"
    assert prediction("sdxl", "v_pred", prediction_type="epsilon") == "v_prediction"
    assert prediction("sd1", prediction_type="v") == prediction("sdxl", predict_key="v") == "v_prediction"
    assert prediction("sd2", prediction_type="epsilon") == prediction("sd2", architecture="stable-diffusion-v2-512") == "epsilon"
    assert prediction("sd2", architecture="stable-diffusion-v2-768-v") == "v_prediction"


def test_the_zero_snr_marker_changes_the_schedule_of_v_models_alone(tmp_path: Path) -> None:
    path = full("sdxl", tmp_path / "a.safetensors", ("v_pred", "ztsnr"))
    found = read(path).scheduler_config
    assert (found["prediction_type"], found["rescale_betas_zero_snr"], found["timestep_spacing"]) == (
        "v_prediction",
        True,
        "trailing",
    )
    assert "rescale_betas_zero_snr" not in read(path, prediction="epsilon").scheduler_config
    assert "rescale_betas_zero_snr" not in read(full("sdxl", path, ["v_pred"])).scheduler_config


def test_a_zero_snr_student_carries_both_markers(pipes: dict[str, Any], tmp_path: Path) -> None:
    scheduler = {**pipes["sdxl"].scheduler.config, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    write(tmp_path / "a.safetensors", networks(pipes["sdxl"]), scheduler, {}, torch.float32)
    assert {"v_pred", "ztsnr"} <= set(load_file(tmp_path / "a.safetensors"))


def test_stable_diffusion_2_without_a_hint_is_refused_and_a_given_prediction_decides(tmp_path: Path) -> None:
    path = full("sd2", tmp_path / "a.safetensors")
    message = refusal(path)
    assert "512 pixels predict epsilon and whose models of 768 pixels predict v" in message
    assert "--prediction-type epsilon or --prediction-type v_prediction" in message
    sizes = {kind: read(path, prediction=kind).configs["unet"]["sample_size"] for kind in ("epsilon", "v_prediction")}
    assert sizes == {"epsilon": 64, "v_prediction": 96}
    assert "'sample' is not supported" in refusal(path, prediction="sample")


def test_a_file_that_contradicts_the_given_descriptions_is_refused_until_someone_decides(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(files["sdxl"], tmp_path / "a.safetensors", add={"v_pred": torch.zeros(0)})
    assert "says that it predicts v_prediction, its description says epsilon" in refusal(path, config=folders["sdxl"])
    assert read(path, folders["sdxl"], "v_prediction").scheduler_config["prediction_type"] == "v_prediction"


LDM = "model: {params: {linear_start: 0.00085, linear_end: 0.0120, timesteps: 1000, scale_factor: 0.18215, EXTRA}}"
SGM = (
    "model: {params: {scale_factor: 0.13025, denoiser_config: {params: {scaling_config: "
    "{target: sgm.modules.diffusionmodules.denoiser_scaling.EXTRA}}}}}"
)


@pytest.mark.parametrize(
    ("family", "content", "predicted"),
    [
        ("sd1", LDM.replace("EXTRA", 'parameterization: "v"'), "v_prediction"),
        ("sd1", LDM.replace(", EXTRA", ""), "epsilon"),
        ("sd2", LDM.replace("EXTRA", "parameterization: v"), "v_prediction"),
        ("sd2", LDM.replace("EXTRA", "parameterization: eps"), "epsilon"),
        ("sdxl", SGM.replace("EXTRA", "VScaling"), "v_prediction"),
        ("sdxl", SGM.replace("EXTRA", "EpsScaling"), "epsilon"),
    ],
)
def test_the_description_beside_a_file_says_what_it_predicts(family: str, content: str, predicted: str, tmp_path: Path) -> None:
    path = full(family, tmp_path / "model.v1.safetensors")
    (tmp_path / "model.v1.yaml").write_text(content)
    found = read(path)
    assert found.scheduler_config["prediction_type"] == predicted and not found.assumed
    assert read(path, prediction="epsilon").scheduler_config["prediction_type"] == "epsilon"


def test_epsilon_is_assumed_only_where_nothing_says_it(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert read(full("sd1", path)).assumed and read(full("sdxl", path)).assumed
    (tmp_path / "a.yaml").write_text("title: notes about something else")
    assert read(path).assumed
    assert not read(path, prediction="epsilon").assumed
    assert not read(full("sd1", path, metadata={"modelspec.prediction_type": "epsilon"})).assumed
    assert not read(full("sdxl", path, ["v_pred"])).assumed
    assert not read(files["sd1"]).assumed


def test_the_notes_of_trainers_count_too(tmp_path: Path) -> None:
    path = full("sd2", tmp_path / "a.safetensors", metadata={"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"})
    found = read(path).scheduler_config
    assert found["prediction_type"] == "v_prediction" and found["rescale_betas_zero_snr"]
    full("sd2", path, metadata={"ss_v_parameterization": "False"})
    assert read(path).scheduler_config["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LDM.replace("EXTRA", "parameterization: x0"), "says that the model predicts 'x0', which is not supported"),
        (SGM.replace("EXTRA", "EDMScaling"), "says that the model predicts 'EDMScaling', which is not supported"),
        (LDM.replace("0.0120", "0.02").replace(", EXTRA", ""), "linear_end is 0.02, not the 0.012 of Stable Diffusion 1"),
        (LDM.replace("0.18215", "1").replace(", EXTRA", ""), "scale_factor is 1, not the 0.18215"),
        ("model: {params: [", "a.yaml is damaged"),
        ("a: !!python/object/apply:os.system ['touch canary']", "a.yaml is damaged: could not determine a constructor"),
        ("[" * 10_000, "a.yaml is damaged"),
        ("a: " + "x" * 70_000, "a.yaml cannot be read"),
        (LDM.replace("EXTRA", "parameterization: v"), "predicts epsilon, the .yaml beside it says v_prediction"),
    ],
    ids=range(9),
)
def test_a_description_beside_a_file_that_does_not_fit_it_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = full("sd1", tmp_path / "a.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    (tmp_path / "a.yaml").write_text(content)
    assert said in refusal(path)
    assert read(path, prediction="v_prediction").scheduler_config["prediction_type"] == "v_prediction"


def test_the_marker_goes_before_the_description_beside_a_file(tmp_path: Path) -> None:
    path = full("sd1", tmp_path / "a.safetensors", ["v_pred"])
    (tmp_path / "a.yaml").write_text(LDM.replace(", EXTRA", ""))
    assert read(path).scheduler_config["prediction_type"] == "v_prediction"


def test_the_zero_snr_marker_also_changes_a_described_schedule(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = changed(files["sd2"], tmp_path / "a.safetensors", add=markers)
    assert read(path, folders["sd2"]).scheduler_config["rescale_betas_zero_snr"]


def test_descriptions_that_are_not_computed_are_refused_from_a_folder_and_from_a_header(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads(header(files["sd1"])["sid.config"])
    config["scheduler"]["use_flow_sigmas"] = True
    path = changed(files["sd1"], tmp_path / "a.safetensors", metadata={"sid.config": json.dumps(config)})
    assert f"the header of {path}: scheduler: use_flow_sigmas is true" in refusal(path)
    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "described", ignore=shutil.ignore_patterns("*.safetensors")))
    text = folder / "text_encoder" / "config.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"use_attention_mask": True}))
    assert f"{text}: use_attention_mask is true" in refusal(changed(files["sd1"], path), config=folder)


# what is refused


def test_a_header_that_is_only_long_is_not_called_a_broken_download(files: dict[str, Path], tmp_path: Path) -> None:
    notes = {"training": "x" * single_file.MAX_HEADER}
    path = changed(files["sd1"], tmp_path / "a.safetensors", metadata=notes)
    message = refusal(path)
    assert "has a header of 8.5 MB; 8.4 MB are read -> save the model again without" in message


@pytest.mark.check(24)
def test_files_that_are_no_safetensors_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    content = files["sd1"].read_bytes()
    for damaged in (b"", b"PK\x03\x04 a pickle in a zip", content[: len(content) // 2], content[:-1], content[:50]):
        path.write_bytes(damaged)
        assert "is not a whole safetensors file" in refusal(path)
    assert "is not a whole safetensors file" in refusal(tmp_path / "none.safetensors")
    assert "is not a whole safetensors file" in refusal(tmp_path)


@pytest.mark.check(24)
def test_a_pointer_of_git_lfs_is_recognized(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 42\n")
    assert refusal(file) == f"{file} is a Git LFS pointer, not the weights themselves -> run `git lfs pull` in its repository"


def test_a_wrong_folder_of_descriptions_is_named_with_what_to_give(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "none", "none is not a folder"), (tmp_path / "empty", "config.json cannot be read")):
        message = refusal(files["sd1"], config=folder)
        assert said in message and message.endswith("-> give --model-config a diffusers folder of the same model family")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA: weights that change another model"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "a LoRA"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 model"),
        ("double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("emb_params", "a textual inversion: an embedding for another model"),
        ("down_blocks.0.resnets.0.conv1.weight", "one network out of a diffusers folder"),
        ("encoder.layers.0.mlp.fc1.weight", "one network out of a diffusers folder"),
        ("input_blocks.0.0.weight", "a UNet alone"),
        ("decoder.up.0.block.0.conv1.weight", "a VAE alone"),
    ],
)
def test_other_kinds_of_files_are_refused_by_name(name: str, kind: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    assert f"seems to be {kind}" in refusal(tmp_path / "a.safetensors")


def test_other_models_of_the_same_layout_are_refused(tmp_path: Path) -> None:
    first, text = f"{ldm.UNET}input_blocks.0.0.weight", f"{ldm.UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    cases: list[tuple[dict[str, list[int]], str]] = [
        ({first: [8, 9, 3, 3]}, "an inpainting model: its UNet takes 9 channels"),
        ({first: [8, 5, 3, 3]}, "a depth-to-image model"),
        ({first: [8, 4, 3, 3], text: [8, 1280]}, "the refiner of Stable Diffusion XL"),
        ({first: [8, 4, 3, 3], text: [8, 640]}, "another architecture"),
        ({first: [8, 4, 3, 3]}, "another architecture"),
        ({first: [8, 4, 3, 3], text: [8, 1024], f"{ldm.UNET}label_emb.0.0.weight": [8, 8]}, "unCLIP"),
        ({first: [8, 4, 3, 3], "edm_mean": [4]}, "continuous (EDM) noise levels"),
        ({"something": [1]}, "holds no UNet of Stable Diffusion"),
    ]
    for tensors, reason in cases:
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
        assert reason in refusal(tmp_path / "a.safetensors")


def test_missing_networks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert "holds the UNet and VAE of Stable Diffusion 1, but no text encoder" in refusal(full("sd1", path, drop="cond_stage"))
    assert "holds the UNet and text encoder of Stable Diffusion 2, but no VAE" in refusal(full("sd2", path, drop="first_stage"))
    message = refusal(full("sdxl", path, drop="conditioner.embedders.1"))
    assert "holds the UNet and VAE and text encoder of Stable Diffusion XL, but no second text encoder" in message


def test_missing_tensors_and_other_shapes_are_named(files: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    path, block = tmp_path / "a.safetensors", f"{ldm.UNET}middle_block.1."
    changed(files["sd1"], path, drop=[block])
    assert f"the UNet in {path} is not that of Stable Diffusion 1: {block}norm.bias, " in refusal(path, config=folders["sd1"])
    key = "first_stage_model.decoder.conv_out.bias"
    changed(files["sd1"], path, add={key: torch.zeros(7)})
    assert f"{key} of shape [7], where [3] belongs" in refusal(path, config=folders["sd1"])
    changed(files["sd1"], path, add={key: torch.zeros(3).to(torch.float8_e4m3fn)})
    assert f"quantized: {key} is F8_E4M3" in refusal(path, config=folders["sd1"])


def test_damaged_descriptions_are_refused(files: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for content in ("{", "[]", "{}", '{"unet": 1}', '{"unet": {}, "vae": {}, "text_encoder": {}}'):
        changed(files["sd1"], path, metadata={"sid.config": content})
        assert "sid.config describes no model" in refusal(path)
    config = json.loads(header(files["sd1"])["sid.config"])
    config["unet"]["down_block_types"] = ["Nothing2D"] * 4
    changed(files["sd1"], path, metadata={"sid.config": json.dumps(config)})
    assert "does not describe a network" in refusal(path)
    assert "unet/config.json cannot be read" in refusal(path, config=tmp_path)


def test_a_header_cannot_choose_an_implementation(files: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads(header(files["sd1"])["sid.config"])
    config["text_encoder"] |= {"attn_implementation": "someone/their-kernel", "_attn_implementation": "someone/their-kernel"}
    config["unet"]["_class_name"] = "Other"
    found = read(changed(files["sd1"], tmp_path / "a.safetensors", metadata={"sid.config": json.dumps(config)}))
    assert set(found.configs["text_encoder"]) <= families.TEXT_KEYS
    assert build("text_encoder", config["text_encoder"]).config._attn_implementation != "someone/their-kernel"
    assert "_class_name" not in found.configs["unet"]


def test_networks_without_names_in_the_layout_are_not_written(pipes: dict[str, Any], tmp_path: Path) -> None:
    unet = dict(pipes["sd1"].unet.config) | {"class_embed_type": "timestep"}
    with pytest.raises(InputError, match="has class_embedding"):
        write(tmp_path / "a.safetensors", networks(pipes["sd1"]) | {"unet": build("unet", unet)}, {}, {}, torch.float32)
    with pytest.raises(InputError, match=r"consists of unet, vae, text_encoder, not unet, vae$"):
        parts = {name: network for name, network in networks(pipes["sd1"]).items() if name != "text_encoder"}
        write(tmp_path / "a.safetensors", parts, {}, {}, torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(pipes: dict[str, Any], tmp_path: Path) -> None:
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        with pytest.raises(EnvironmentProblem, match="cannot write"):
            save(tmp_path / "a.safetensors", pipes["sd1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


# full size


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        ("sd1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd2", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        ("sdxl", {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_descriptions_have_the_published_parameter_counts_and_every_tensor_has_a_place_of_its_own(
    family: str, counts: dict[str, int]
) -> None:
    places, parameters = [], {}
    for component, config in describe(family, "epsilon").components.items():
        with torch.device("meta"):
            network = build(component, config)
        parameters[component] = sum(parameter.numel() for parameter in network.parameters())
        found = single_file.places_in_file(family, component, network, ldm.PREFIXES[family][component][0])
        assert found.keys() == network.state_dict().keys()
        places += [(place.key, place.part) for place in found.values()]
    assert parameters == counts
    assert len(set(places)) == len(places)
    shared = {key for key, part in places if part is not None}
    assert all({part for other, part in places if other == key} == {0, 1, 2} for key in shared)


@pytest.mark.parametrize(
    ("family", "component", "name", "key"),
    [
        ("sd1", "unet", f"down_blocks.0.attentions.0.{TO_K}", f"input_blocks.1.1.{TO_K}"),
        ("sd1", "unet", "down_blocks.2.downsamplers.0.conv.bias", "input_blocks.9.0.op.bias"),
        ("sd1", "unet", "down_blocks.3.resnets.1.time_emb_proj.weight", "input_blocks.11.0.emb_layers.1.weight"),
        ("sd1", "unet", "mid_block.resnets.1.norm2.weight", "middle_block.2.out_layers.0.weight"),
        ("sd1", "unet", "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("sd1", "unet", "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("sd1", "unet", "up_blocks.3.resnets.2.conv_shortcut.weight", "output_blocks.11.0.skip_connection.weight"),
        ("sd1", "unet", "conv_out.bias", "out.2.bias"),
        ("sd2", "unet", f"down_blocks.0.attentions.1.{TO_K}", f"input_blocks.2.1.{TO_K}"),
        ("sdxl", "unet", "down_blocks.1.attentions.0.transformer_blocks.1.norm3.bias", "input_blocks.4.1.transformer_blocks.1.norm3.bias"),
        ("sdxl", "unet", "up_blocks.0.attentions.2.transformer_blocks.9.norm1.bias", "output_blocks.2.1.transformer_blocks.9.norm1.bias"),
        ("sdxl", "unet", "up_blocks.2.resnets.2.conv1.weight", "output_blocks.8.0.in_layers.2.weight"),
        ("sdxl", "unet", "add_embedding.linear_2.bias", "label_emb.0.2.bias"),
        ("sd1", "vae", "decoder.up_blocks.0.resnets.0.norm1.weight", "decoder.up.3.block.0.norm1.weight"),
        ("sd1", "vae", "decoder.up_blocks.2.resnets.0.conv_shortcut.bias", "decoder.up.1.block.0.nin_shortcut.bias"),
        ("sd1", "vae", "encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.attn_1.proj_out.weight"),
        ("sd1", "vae", "encoder.down_blocks.0.downsamplers.0.conv.weight", "encoder.down.0.downsample.conv.weight"),
        ("sd1", "text_encoder", "encoder.layers.11.mlp.fc2.bias", "encoder.layers.11.mlp.fc2.bias"),
        ("sd2", "text_encoder", "encoder.layers.22.self_attn.v_proj.bias", "transformer.resblocks.22.attn.in_proj_bias"),
        ("sd2", "text_encoder", "embeddings.position_embedding.weight", "positional_embedding"),
        ("sdxl", "text_encoder", "final_layer_norm.weight", "final_layer_norm.weight"),
        ("sdxl", "text_encoder_2", "text_model.encoder.layers.31.self_attn.q_proj.weight", "transformer.resblocks.31.attn.in_proj_weight"),
        ("sdxl", "text_encoder_2", "text_model.encoder.layers.9.mlp.fc2.bias", "transformer.resblocks.9.mlp.c_proj.bias"),
        ("sdxl", "text_encoder_2", "text_projection.weight", "text_projection"),
    ],
)  # fmt: skip
def test_well_known_tensors_have_their_well_known_names(family: str, component: str, name: str, key: str) -> None:
    prefix = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "sd1": "cond_stage_model.transformer.text_model.",
        "sd2": "cond_stage_model.model.",
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }[family if component == "text_encoder" and family != "sdxl" else component]
    config = FAMILIES[family].components[component]
    place = ldm.locate(ldm.places_of(family, component, config, ldm.PREFIXES[family][component][0]), name)
    assert place is not None and place.key == prefix + key


def test_copies_of_descriptions_are_free_to_change() -> None:
    changed = describe("sd1", "v_prediction")
    changed.components["unet"]["sample_size"] = 1
    assert FAMILIES["sd1"].components["unet"]["sample_size"] == 64
    assert FAMILIES["sd1"].scheduler["prediction_type"] == "epsilon"
    assert (describe("sd2", "v_prediction").scheduler["_class_name"], describe("sd2", "epsilon").scheduler["_class_name"]) == (
        "DDIMScheduler",
        "PNDMScheduler",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_schedulers_know_every_setting_of_their_descriptions(family: str) -> None:
    for prediction, zero_snr in (("epsilon", False), ("v_prediction", False), ("v_prediction", True)):
        config = describe(family, prediction, zero_snr).scheduler
        kind = getattr(diffusers, config.pop("_class_name"))
        assert set(config) <= set(inspect.signature(kind).parameters)
        assert kind(**config).config.prediction_type == prediction


def test_what_no_parameter_shows_is_as_published() -> None:
    unets = {name: family.components["unet"] for name, family in FAMILIES.items()}
    assert unets["sd1"]["attention_head_dim"] == 8
    for name in ("sd2", "sdxl"):
        sides = zip(unets[name]["block_out_channels"], unets[name]["attention_head_dim"], strict=True)
        assert {width / heads for width, heads in sides} == {64}
    assert {name: family.components["vae"]["scaling_factor"] for name, family in FAMILIES.items()} == {
        "sd1": 0.18215,
        "sd2": 0.18215,
        "sdxl": 0.13025,
    }
    texts = {(name, key): config for name, family in FAMILIES.items() for key, config in family.components.items() if "text" in key}
    assert {key for key, config in texts.items() if config["hidden_act"] == "gelu"} == ldm.OPENCLIP
    assert {config["hidden_size"] / config["num_attention_heads"] for config in texts.values()} == {64}
    assert {name: unet["sample_size"] for name, unet in unets.items()} == {"sd1": 64, "sd2": 64, "sdxl": 128}


def test_the_tokenizers_are_those_of_clip() -> None:
    ids = clip_tokenizer()("A photo of a cat, 🐱!", padding="max_length").input_ids
    assert ids[:6] == [49406, 320, 1125, 539, 320, 2368] and ids[-1] == 49407 and len(ids) == 77
    assert clip_tokenizer("!")("a cat", padding="max_length").input_ids == [49406, 320, 2368, 49407] + 73 * [0]
    assert len(clip_tokenizer()) == families.WORDS


# ComfyUI


def test_the_comfyui_workflow_connects_outputs_to_inputs_of_the_same_type() -> None:
    made = comfyui.workflow("student.safetensors", [2.5017056], 512, 512, "a cat", 7, "v_prediction")
    nodes = {node["id"]: node for node in made["nodes"]}
    for number, source, output, target, slot, kind in made["links"]:
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == number
        assert nodes[source]["order"] < nodes[target]["order"]
    assert len(made["links"]) == sum(len(node["inputs"]) for node in made["nodes"]) == made["last_link_id"]
    types = {slot["name"]: slot["type"] for node in made["nodes"] for slot in node["inputs"]}
    assert types == {
        "model": "MODEL",
        "clip": "CLIP",
        "vae": "VAE",
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "sampler": "SAMPLER",
        "sigmas": "SIGMAS",
        "latent_image": "LATENT",
        "samples": "LATENT",
        "images": "IMAGE",
    }
    widgets = {node["type"]: node["widgets_values"] for node in made["nodes"] if node["widgets_values"] != [""]}
    assert widgets["CheckpointLoaderSimple"] == ["student.safetensors"]
    assert widgets["ManualSigmas"] == ["2.501706, 0"]
    assert widgets["SamplerCustom"] == [True, 7, "fixed", 1.0]
    assert widgets["ModelSamplingDiscrete"] == ["v_prediction", False]
    assert widgets["CLIPTextEncode"] == ["a cat"]
    places = {tuple(node["pos"]) for node in made["nodes"]}
    assert len(places) == len(nodes)
    sampler = next(node for node in made["nodes"] if node["type"] == "SamplerCustom")
    assert [slot["name"] for slot in sampler["inputs"]] == ["model", "positive", "negative", "sampler", "sigmas", "latent_image"]
    texts = [nodes[made["links"][sampler["inputs"][slot]["link"] - 1][1]]["widgets_values"] for slot in (1, 2)]
    assert texts == [["a cat"], [""]]
    assert json.loads(json.dumps(made)) == made
