"""The command as a whole: what it loads, how it ends, what it does on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import Run, Shell
from helpers.tables import for_each
from helpers.terminal import Open

from llava_cli.models.registry import builtin_folder

ROOT = Path(__file__).parents[2]


@for_each("args", [["--help"], ["--version"], ["ask", "--help"], ["models", "--help"], []])
def test_help_is_light(args: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"sys.argv = ['llava', *{args!r}]\n"
        "def look():\n"
        "    heavy = {'torch', 'transformers', 'rich', 'numpy', 'PIL', 'huggingface_hub', 'httpx'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)\n"
        "atexit.register(look)\n"
        "from llava_cli.start import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == "heavy: []\n"


def test_importing_the_library_is_light() -> None:
    code = "import sys, llava_cli as l; l.Sampling; l.load; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_every_command_is_in_the_readme(run: Run) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for words in ("ask", "export", "prompt", "report", "doctor", "models pull", "models default"):
        assert f"llava {words}" in readme
        assert run(*words.split(), "--help").exit_code == 0


def test_examples_in_the_help_name_real_options(run: Run) -> None:
    for command in ("ask", "export", "prompt", "report", "models pull", "models default"):
        text = run(*command.split(), "--help").stdout
        examples = re.findall(r"^  llava .+$", text, re.M)
        assert examples
        for example in examples:
            assert set(re.findall(r"(?<= )--?[a-z-]+", example)) <= set(re.findall(r"--?[a-z-]+", text))


@for_each(
    "args, code, line",
    [
        (["ask"], 2, "llava: QUESTION: there is none"),
        (["ask", ""], 2, "llava: QUESTION: there is none"),
        (["ask", "DRAWING", "  "], 2, "llava: QUESTION: there is none"),
        (["ask", "DRAWING"], 2, "llava: QUESTION: there is none"),
        (["ask", "missing.png"], 66, "llava: missing.png: no such file or directory"),
        (["ask", "missing.png", "what is this?"], 66, "llava: missing.png: no such file or directory"),
        (["ask", "DRAWING", "what?", "--precision", "fp8"], 2, "llava: ask: "),
        (["ask", "DRAWING", "what?", "--nonsense"], 2, "llava: ask: "),
        (["ask", "DRAWING", "what?", "--temperature", "-1"], 2, "llava: --temperature: -1.0 is not between 0 and 10"),
        (["ask", "DRAWING", "what?", "--max-tokens", "0"], 2, "llava: --max-tokens: 0 is not between"),
        (["ask", "DRAWING", "what?", "-m", "llava-1.5-8b"], 69, "llava: llava-1.5-8b: unknown model"),
        (["ask", "DRAWING", "what?", "-m", "llava-1.5-7b"], 69, "llava: llava-1.5-7b: not on this machine"),
        (["ask", "DRAWING", "what?", "--device", "cuda"], 2, "llava: --device cuda: this machine has none"),
        (["nonsense"], 2, "llava: command: no such command"),
    ],
)
def test_errors_are_one_line_and_a_hint(args: list[str], code: int, line: str, run: Run, drawing: Path) -> None:
    if "cuda" in args:
        import torch

        if torch.cuda.is_available():
            args[-1] = "mps"
            line = line.replace("cuda", "mps")
    result = run(*[str(drawing) if a == "DRAWING" else a for a in args])
    first, *hints = result.stderr.splitlines()
    assert result.exit_code == code
    assert first.startswith(line)
    assert all(hint.startswith("  ") for hint in hints)
    assert len(hints) <= 1
    assert result.stdout == ""


def test_debug_shows_the_traceback(shell: Shell) -> None:
    done = shell("ask", "missing.png", "what?", env={**os.environ, "LLAVA_DEBUG": "1"})
    assert b"Traceback" in done.stderr


def test_question_on_stdin(run: Run, drawing: Path) -> None:
    asked = run("ask", drawing, "--json", "--max-tokens", "2", input="what color is the circle?\n")
    assert '"question": "what color is the circle?"' in asked.stdout


def test_picture_on_stdin(run: Run, drawing: Path) -> None:
    given = run("ask", "-", "what is this?", "--json", input=drawing.read_bytes())
    named = run("ask", drawing, "what is this?", "--json")
    assert given.exit_code == 0
    a, b = json.loads(given.stdout), json.loads(named.stdout)
    assert (a["answer"], a["images"], b["images"]) == (b["answer"], ["-"], [str(drawing)])


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_nothing_but_the_answer_in_a_pipe(precision: str, shell: Shell, drawing: Path) -> None:
    """Nor do the libraries that quantize print anything."""
    done = shell("ask", drawing, "what is this?", "-q", "-p", precision)
    assert done.returncode == 0
    assert done.stderr == b""
    assert len(done.stdout.splitlines()) == 1
    assert b"\x1b" not in done.stdout


def test_stats_on_stderr(run: Run, drawing: Path) -> None:
    result = run("ask", drawing, "what is this?", "--stats")
    parts = r"builtin \w+ cpu · load [\d.]+ s · first token [\d.]+ s of \d+ · .* · peak [\d.]+ GB"
    assert re.search(parts, result.stderr)


def test_reader_that_leaves_ends_it_quietly(drawing: Path) -> None:
    command = f'{sys.executable} -m llava_cli ask "{drawing}" "what is this?" -q | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_answer_in_a_locale_without_its_letters(shell: Shell, drawing: Path) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = shell("prompt", drawing, "qu'est-ce que c'est, une étoile ?", "-q", env=env)
    assert done.returncode == 0
    assert b"une \\xe9toile" in done.stdout


def test_json_stays_json_in_a_locale_without_its_letters(shell: Shell, drawing: Path) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = shell("prompt", drawing, "une étoile 🙂 ?", "--json", env=env)
    assert "une étoile 🙂 ?" in json.loads(done.stdout)["prompt"]


def test_picture_on_stdin_without_its_dash_is_no_question(run: Run, drawing: Path) -> None:
    result = run("ask", drawing, input=drawing.read_bytes())
    assert result.exit_code in (0, 65)  # bytes that are no text make an odd question, but no traceback


@pytest.mark.parametrize("words", ["--version", "models default", "ask DRAWING hm? -q"])
def test_full_disk_is_said_and_has_its_code(words: str, drawing: Path) -> None:
    command = [sys.executable, "-m", "llava_cli", *(str(drawing) if w == "DRAWING" else w for w in words.split())]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (74, "llava: output: no space left on device\n")


def test_closed_stderr_sends_nothing_to_stdout(drawing: Path) -> None:
    command = f'{sys.executable} -m llava_cli ask "{drawing}" "what is this?" 2>&-'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (0, 1, "")


def test_terminal_shows_a_spinner_and_ctrl_c_ends_the_answer(terminal: Open, drawing: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(builtin_folder(), endless)
    (endless / "generation_config.json").write_text('{"eos_token_id": []}')
    child = terminal("ask", drawing, "what is this?", "-m", endless, "--max-tokens", "1000")
    child.expect("loading the model")
    child.expect(r"\x1b\[\?25h")  # the spinner is gone and the cursor back
    child.expect(r"\w{3}")
    child.sendintr()
    assert child.leave() == 130
    assert (child.before or "").endswith("\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_libraries_are_imported_ends_it_with_its_code(
    number: signal.Signals, terminal: Open, drawing: Path, tmp_path: Path
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HELD)
    child = terminal("ask", drawing, "what is this?", PYTHONPATH=str(tmp_path / "hook"))
    child.expect("held")
    child.expect("loading the model")
    child.kill(number)
    assert child.leave() == 128 + number
    assert (child.before or "").endswith("\x1b[2K\x1b[?25h")  # nothing is said, and the cursor is back


HELD = """
import sys, threading

class Held:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("held", flush=True)
            threading.Event().wait()

sys.meta_path.insert(0, Held())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_finalizer_ends_the_command(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.replace("SIGINT", number.name))
    done = subprocess.run([sys.executable, script], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, b"", b"")


def test_ctrl_c_waits_for_an_import_where_it_is_to_stop_an_answer(tmp_path: Path) -> None:
    """Once, however often it is pressed: none comes later."""
    (tmp_path / "library.py").write_text(
        "import signal\nfor _ in range(4):\n    signal.raise_signal(signal.SIGINT)\nprint('imported')"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import threading; from llava_cli import signals\n"
        "signals.start(); signals.spare_imports()\n"
        "try:\n    import library; threading.Event().wait()\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
        "for thread in threading.enumerate():\n    thread is threading.main_thread() or thread.join()"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported\nstopped\n", "")


def test_ctrl_c_is_ignored_where_it_was() -> None:
    """As it is in what a script runs with `&`."""
    code = (
        "import signal, sys; from llava_cli.start import main\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.argv = ['llava', '--version']\n"
        "try:\n    main()\n"
        "finally:\n    signal.raise_signal(signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""


INTERRUPTED = """
import signal, sys, threading
from llava_cli import cli, start

class Ending:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

@cli.app.command()
def end():
    ending = Ending()
    del ending
    threading.Event().wait()

sys.argv = ["llava", "end"]
start.main()
"""


def test_doctor_names_what_it_would_choose(run: Run) -> None:
    text = run("doctor").stdout
    for name in ("memory", "device", "precision", "attention", "torch", "default model\tbuiltin"):
        assert name in text
    assert "fp16" not in text or "cuda" in text or "mps" in text
