"""Who is compared by `speed.py`, and what each needs before it can run: an environment, a model in its own format.

All of it goes to one folder, `cache`, and is made only once: environments with what they need from PyPI, the random
checkpoint, and for llama.cpp and OpenVINO the same geometry in their formats.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

WORKERS = Path(__file__).parent / "workers"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Contender:
    """One way to answer: a worker script, the Python that runs it, the model it loads."""

    name: str
    script: str
    precision: str
    python: Callable[[Path], Path]
    """The cache -> its environment's Python."""
    model: Callable[[Path, str], Path]
    """The cache and the size -> its model."""
    packages: tuple[str, ...]
    """Whose versions are told."""
    sizes: tuple[str, ...] = ("1B", "7B")


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """What is at `path`, made there whole if it is not."""
    if not path.exists():
        part = path.with_name(f"part-{path.name}")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(path)
    return path


def checkpoint(cache: Path, size: str) -> Path:
    """A LLaVA checkpoint of this size, made by a process that gives its memory back."""
    script = Path(__file__).with_name("geometry.py")
    return made(cache / size, lambda part: subprocess.run([sys.executable, script, size, part], check=True))


def picture(cache: Path) -> Path:
    """The one that everybody is asked about."""
    if not (path := cache / "picture.png").exists():
        Image.effect_noise((640, 480), 90).convert("RGB").save(path)
    return path


def here(cache: Path) -> Path:
    """This environment."""
    return Path(sys.executable)


def llama_python(cache: Path) -> Path:
    """llama.cpp, built for this very CPU: five minutes. Without AMX, where it crashes at its first prompt."""
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() == "x86_64" else ""
    how = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CFLAGS": flags, "CXXFLAGS": flags}
    return environment(cache / "llamacpp", "llama_cpp, gguf", ["llama-cpp-python", "gguf"], **how)


def openvino_python(cache: Path) -> Path:
    needed = ["openvino-genai", "openvino-tokenizers", "pillow"]
    return environment(cache / "openvino", "openvino_genai, PIL", needed)


def export_python(cache: Path) -> Path:
    """What exports for OpenVINO; torchvision, which it does not need, would have to be torch's very twin."""
    needed = [TORCH, "transformers<5", "optimum-intel[openvino]", "nncf"]
    return environment(cache / "ovexport", "optimum.exporters.openvino.convert", needed, without="torchvision")


def environment(folder: Path, imports: str, packages: list[str], without: str = "", **variables: str) -> Path:
    python = folder / "bin" / "python"
    ready = [str(python), "-c", f"import {imports}"]
    if not python.exists() or subprocess.run(ready, capture_output=True).returncode:
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", *packages], env=os.environ | variables, check=True)
        if without:
            subprocess.run([*pip, "uninstall", "-y", without], check=True)
        subprocess.run(ready, check=True)
    return python


def gguf(cache: Path, size: str) -> Path:
    command = [llama_python(cache), WORKERS / "llama_write.py", checkpoint(cache, size) / "config.json"]
    return made(cache / f"{size}.gguf", lambda part: subprocess.run([*command, part], check=True))


def gguf_here(cache: Path, size: str) -> Path:
    """The same, written by this environment."""
    command = [sys.executable, WORKERS / "llama_write.py", checkpoint(cache, size) / "config.json"]
    return made(cache / f"{size}.gguf", lambda part: subprocess.run([*command, part], check=True))


def exported(cache: Path, size: str) -> Path:
    command = [export_python(cache), WORKERS / "ov_export.py", checkpoint(cache, size)]
    # It has a lot to say.
    return made(
        cache / f"{size}-openvino", lambda part: subprocess.run([*command, part], check=True, capture_output=True)
    )


OURS = ("torch", "transformers", "bitsandbytes")
CONTENDERS = [
    Contender("llava 4bit", "ours.py", "4bit", here, checkpoint, OURS),
    Contender("llava 8bit", "ours.py", "8bit", here, checkpoint, OURS, ("1B",)),
    Contender("llava bf16", "ours.py", "bf16", here, checkpoint, OURS, ("1B",)),
    Contender("transformers nf4", "plain.py", "nf4", here, checkpoint, OURS, ("1B",)),
    Contender("transformers bf16", "plain.py", "bf16", here, checkpoint, OURS, ("1B",)),
    Contender("llama.cpp Q4_0", "llama_run.py", "Q4_0", llama_python, gguf, ("llama-cpp-python",)),
    Contender("OpenVINO int4", "ov_run.py", "int4", openvino_python, exported, ("openvino-genai",)),
]
