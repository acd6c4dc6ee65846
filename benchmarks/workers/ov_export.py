"""Exports a LLaVA checkpoint for OpenVINO, its decoder in 4 bits: `ov_export.py CHECKPOINT FOLDER`.

Runs in an environment of its own with transformers 4, which optimum-intel is made for, and reads our checkpoint
there: the same tensors, its tokenizer and picture processor under the names that transformers 4 has for them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from optimum.exporters.openvino.convert import export_tokenizer  # type: ignore[import-not-found]
from transformers import AutoTokenizer


def as_transformers_4(checkpoint: Path, folder: Path) -> None:
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path.resolve())

    def write(name: str, content: dict[str, object]) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(content))

    processor = json.loads((checkpoint / "processor_config.json").read_text())
    write("preprocessor_config.json", processor.pop("image_processor"))
    write("processor_config.json", processor)
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    for name in ("backend", "extra_special_tokens", "model_specific_special_tokens"):
        tokenizer.pop(name, None)
    write("tokenizer_config.json", {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
    write("config.json", {**config, "torch_dtype": config["dtype"]})


def main() -> None:
    checkpoint, folder = map(Path, sys.argv[1:])
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--task", "image-text-to-text"]
    four = ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0"]
    with tempfile.TemporaryDirectory() as name:
        as_transformers_4(checkpoint, Path(name))
        subprocess.run([*command, *four, "--model", name, str(folder)], check=True)
        export_tokenizer(AutoTokenizer.from_pretrained(name), folder)


if __name__ == "__main__":
    main()
