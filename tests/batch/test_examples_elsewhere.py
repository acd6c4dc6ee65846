"""The examples of runs on many machines: their own commands, with one machine in the place of many."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.peer import by_picture, serving

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "what is this?"


@pytest.fixture
def here(tmp_path: Path, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with pictures and a single run's rows, where `llava` is this one, with a server that answers at once."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(drawing.read_bytes())
    command = tmp_path / "bin" / "llava"
    command.parent.mkdir()
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    with serving() as peer:
        peer.usual = by_picture
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m llava_cli "$@" --server {peer.url}\n')
        command.chmod(0o755)
        subprocess.run(["llava", "batch", "photos", QUESTION, "-q", "-o", "single.jsonl"], check=True)
        yield tmp_path


def test_an_array_job(here: Path) -> None:
    """It has as many tasks as the script says."""
    script = EXAMPLES / "slurm.sh"
    found = re.search(r"--array=1-(\d+)$", script.read_text(), re.M)
    assert found
    settings = {"SOURCE": "photos", "QUESTION": QUESTION, "OUTPUT": "out.jsonl"}
    for number in range(int(found[1]), 0, -1):
        environment = {**os.environ, **settings, "SLURM_ARRAY_TASK_ID": str(number)}
        subprocess.run(["bash", script], check=True, env=environment, capture_output=True)
    assert Path("out.jsonl").read_bytes() == Path("single.jsonl").read_bytes()


def test_an_indexed_job(here: Path) -> None:
    """Its command line, over a folder in the place of buckets."""
    spec = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())["spec"]
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    (line,) = container["args"]
    line = line.replace("s3://photos/2024/", "photos").replace("s3://results/out.jsonl", "out.jsonl")
    line = line.replace("describe the photo", QUESTION)
    for index in range(spec["completions"]):
        environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index)}
        subprocess.run([*container["command"], line], check=True, env=environment, capture_output=True)
    assert Path("out.jsonl").read_bytes() == Path("single.jsonl").read_bytes()


def test_the_other_scripts_are_whole() -> None:
    subprocess.run(["bash", "-n", EXAMPLES / "parallel.sh"], check=True)
    lines = [line.partition("#")[0].strip() for line in (EXAMPLES / "nginx.conf").read_text().splitlines()]
    assert all(line.endswith((";", "{", "}")) for line in lines if line)
