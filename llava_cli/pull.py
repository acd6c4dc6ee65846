"""Downloads from the Hub into its own cache, going on where an earlier download was cut off."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_cli.errors import LlavaError, ModelUnusable, OutputError, brief
from llava_cli.registry import ALIASES, Checkpoint, find, hub_cache, is_folder, remember, repo_cache, repo_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

# Weights in safetensors and what it takes to use them; never pickles, never code.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def pull(name: str, progress: Callable[[int, int], None], judge: Callable[[Checkpoint], object]) -> Path:
    """Downloads an alias or repo, going on where an earlier pull was cut off, and returns its folder.

    What is on disk is compared with the Hub's hashes, so that another pull mends a damaged file.
    `judge` may refuse the model from its small files, before the weights are fetched. `progress` is
    called with (bytes here, bytes in all). Raises `ModelUnusable` where the Hub does not have or give
    it, `OutputError` where it cannot be written.
    """
    if is_folder(name) or (name not in ALIASES and "/" not in name):
        return find(name).folder  # here already; where it is not, says what was probably meant
    repo, cache, again = repo_of(name), repo_cache(name), f"llava models pull {name}"
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    done, total, commit = 0, 0, ""

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        files, commit = _wanted(info.siblings or []), str(info.sha)
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            raise ModelUnusable(name, "has no safetensors weights; pickles are never loaded")
        total = sum(file.size or 0 for file in files)
        snapshot = cache / "snapshots" / commit
        cache.mkdir(parents=True, exist_ok=True)
        missing = [file for file in files if not _same(snapshot / file.rfilename, file)]
        count(total - sum(file.size or 0 for file in missing))
        needed = sum((file.size or 0) - _fetched(cache, file) for file in missing)
        if needed > (free := shutil.disk_usage(cache).free):
            raise OutputError(str(cache), f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        for file in missing:
            if file.rfilename.endswith(".safetensors"):
                judge(Checkpoint(name, snapshot))
            (snapshot / file.rfilename).unlink(missing_ok=True)
            if _hash(file) and not _fetch(repo, commit, file, cache, count):
                raise ModelUnusable(name, f"{file.rfilename} arrived damaged", again)
            hf_hub_download(repo, file.rfilename, revision=commit, cache_dir=hub_cache())  # puts it in its place
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(commit)
        remember(name)
        return snapshot
    except LlavaError:
        raise
    except GatedRepoError:
        hint = f"ask at the Hub's page of {repo}, then: hf auth login"
        raise ModelUnusable(name, "needs its owner's leave", hint) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelUnusable(name, "the Hub has no such model", "llava models lists what there is") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the Hub's and the network's have none
            raise OutputError(str(error.filename or cache), error.strerror or str(error), again) from None
        what = "the download broke off" if commit else "the Hub cannot be reached"
        raise ModelUnusable(name, f"{what} ({brief(error)})", again) from None


def _wanted(files: Sequence[RepoSibling]) -> list[RepoSibling]:
    """The files that make up the checkpoint, the weights last: where they are whole, all is."""

    def wanted(name: str) -> bool:
        # Folders hold other formats, and "consolidated" weights are the same ones once more.
        return "/" not in name and not name.startswith("consolidated") and any(fnmatch(name, w) for w in WANTED)

    return sorted((f for f in files if wanted(f.rfilename)), key=lambda f: f.rfilename.endswith(".safetensors"))


def _same(path: Path, file: RepoSibling) -> bool:
    """Whether a file on disk is, byte for byte, what the Hub has."""
    if not path.is_file() or not _hash(file):
        return path.is_file()  # a mirror of the Hub may list names alone
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as data:
        while part := data.read(2**20):
            digest.update(part)
    return digest.hexdigest() == _hash(file)


def _hash(file: RepoSibling) -> str | None:
    """SHA-256 of a big file, git's own hash of a small one."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def _blob(cache: Path, file: RepoSibling) -> tuple[Path, Path]:
    """Where the cache keeps a file's bytes, and where they are until all have come."""
    blob = cache / "blobs" / str(_hash(file))
    return blob, blob.with_name(f"{blob.name}.incomplete")


def _fetched(cache: Path, file: RepoSibling) -> int:
    return sum(path.stat().st_size for path in _blob(cache, file) if path.exists())


def _fetch(repo: str, commit: str, file: RepoSibling, cache: Path, count: Callable[[int], None]) -> bool:
    """Downloads a file's bytes into the cache; False where what arrived is not what the Hub has.

    huggingface_hub's own download begins anew after every break: GBs on a slow line.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # loaded lazily

    class Meter:
        """What huggingface_hub takes for a tqdm bar: it only counts."""

        def __init__(self, initial: int = 0, **_: object) -> None:
            count(initial)

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, n: int) -> None:
            count(n)

    size = file.size or 0
    blob, part = _blob(cache, file)
    lock = cache.parent / ".locks" / cache.name / f"{blob.name}.lock"  # huggingface_hub's own
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if _same(blob, file):
            count(size)
            return True
        meter: Any = Meter
        with part.open("ab") as out:
            if (here := out.tell()) < size:
                url, headers = hf_hub_url(repo, file.rfilename, revision=commit), build_hf_headers()
                http_get(url, out, resume_size=here, headers=headers, expected_size=size, tqdm_class=meter)
        if not _same(part, file):
            part.unlink()
            return False
        part.replace(blob)
        return True
