"""Pictures from the clipboard and of the screen, on a real X server, and what is said where there is none."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from helpers.command import Run
from helpers.desktop import HEIGHT, WIDTH, Copy, copy, display, program
from helpers.tables import for_each
from PIL import Image

from llava_cli import limits, open_picture
from llava_cli.errors import BadImage, InputMissing, PromptTooLong
from llava_cli.images.clipboard import clipboard_text, open_clipboard
from llava_cli.images.screen import open_screen
from llava_cli.settings import PictureOptions

__all__ = ["copy", "display"]
ALL = PictureOptions()
HAVE_PROGRAMS = os.environ["PATH"]


def encoded(path: Path, kind: str) -> bytes:
    Image.open(path).save(data := io.BytesIO(), kind)
    return data.getvalue()


def test_a_picture_on_the_clipboard(copy: Copy, drawing: Path, run: Run) -> None:
    copy(drawing, "image/png")
    result = run("ask", "-q", "--clipboard", "what color is the circle?")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "red\n", "")
    copy(encoded(drawing, "JPEG"), "image/jpeg")
    result = run("ask", "-q", drawing, "--clipboard", "--region", "50%,0,100%,100%", "--json", input="what is this?")
    assert '"images": ["' + str(drawing) + '", "clipboard"]' in result.stdout
    assert "blue triangle" in result.stdout
    assert run("check", "-q", "--clipboard", "there is a circle").exit_code == 0


@for_each("kind, as_type", [("PNG", "image/png"), ("WEBP", "image/webp"), ("BMP", "image/bmp"), ("GIF", "image/x-gif")])
def test_its_pixels_are_those_of_the_file(kind: str, as_type: str, copy: Copy, tmp_path: Path, drawing: Path) -> None:
    (file := tmp_path / "copied").write_bytes(encoded(drawing, kind))
    copy(file, as_type)
    (picture,) = open_clipboard(ALL).pictures
    expected = open_picture(str(file))
    assert (picture.image, picture.sha256, picture.name) == (expected.image, expected.sha256, "clipboard")


def test_files_that_were_copied(copy: Copy, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing.rename(file := tmp_path / "a 100% #2.png")
    other = tmp_path / "b.png"
    Image.new("RGB", (9, 8)).save(other)
    lines = ["# copied", file.as_uri(), "http://pictures.example/a.png", other.as_uri(), "file://elsewhere/a.png", ""]
    copy("\r\n".join(lines).encode(), "text/uri-list")
    assert [picture.name for picture in open_clipboard(ALL).pictures] == [str(file), str(other)]
    monkeypatch.setattr(limits, "QUESTION_PICTURES", 1)
    with pytest.raises(PromptTooLong, match=r"^clipboard: has 2 files; a question has at most 1$"):
        open_clipboard(ALL)
    copy(b"http://pictures.example/a.png\r\n", "text/uri-list")
    with pytest.raises(InputMissing, match=r"^clipboard: has no picture$"):
        open_clipboard(ALL)


def test_what_is_no_picture(copy: Copy, run: Run) -> None:
    assert clipboard_text() == ""
    asked = ("ask", "--clipboard", "what does this error mean?")
    empty = run(*asked)
    assert (empty.exit_code, empty.stdout) == (66, "")
    assert empty.stderr == "llava: clipboard: is empty\n  copy a picture first\n"
    copy("häßlich".encode())
    assert run(*asked).stderr == "llava: clipboard: has text, no picture\n  copy a picture first\n"
    assert clipboard_text() == "häßlich"
    copy(b"not a picture", "image/png")
    hostile = run(*asked)
    assert (hostile.exit_code, hostile.stderr.count("\n")) == (65, 1)
    assert hostile.stderr.startswith("llava: clipboard: ")


NOBODY = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "SSH_CONNECTION": "", "XDG_CURRENT_DESKTOP": "", "PATH": "/nowhere"}


@for_each(
    "take, variables, message",
    [
        ("--clipboard", {}, "clipboard: there is no display\n  llava ask - QUESTION < PICTURE"),
        ("--screen", {}, "screen: there is no display\n  llava ask - QUESTION < PICTURE"),
        (
            "--clipboard",
            {"SSH_CONNECTION": "1.2.3.4"},
            "clipboard: there is no display over ssh\n  ssh -X brings your display along",
        ),
        ("--clipboard", {"DISPLAY": ":1"}, "clipboard: xclip is not installed\n  apt install xclip"),
        (
            "--clipboard",
            {"DISPLAY": ":1", "WAYLAND_DISPLAY": "w"},
            "clipboard: wl-paste is not installed\n  apt install wl-clipboard",
        ),
        ("--screen", {"WAYLAND_DISPLAY": "w"}, "screen: grim is not installed\n  apt install grim"),
        (
            "--screen",
            {"WAYLAND_DISPLAY": "w", "XDG_CURRENT_DESKTOP": "ubuntu:GNOME"},
            "screen: gnome-screenshot is not installed\n  apt install gnome-screenshot",
        ),
        (
            "--screen",
            {"DISPLAY": ":4711"},
            "screen: there is no display :4711\n  llava ask - QUESTION < PICTURE",
        ),
    ],
)
def test_nobody_to_ask(
    take: str, variables: dict[str, str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**NOBODY, **variables}.items():
        monkeypatch.setenv(name, value)
    result = run("ask", take, "what is this?")
    assert (result.exit_code, result.stdout, result.stderr) == (66, "", f"llava: {message}\n")


@pytest.mark.parametrize("script", ["exec sleep 1000", "sleep 1000 & wait", "exec sleep 1000 >&-"])
def test_a_program_that_hangs_is_ended(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "xclip", f"echo $$ > {tmp_path}/pid\n{script}")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{HAVE_PROGRAMS}")
    monkeypatch.setenv("DISPLAY", ":1")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(limits, "CLIPBOARD_SECONDS", 0.5)
    with pytest.raises(InputMissing, match=r"^clipboard: xclip does not answer within 0.5 s$"):
        open_clipboard(ALL)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_program_that_never_ends_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "xclip", 'case "$*" in *TARGETS) echo image/png;; *) exec yes;; esac')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{HAVE_PROGRAMS}")
    monkeypatch.setenv("DISPLAY", ":1")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(limits, "PICTURE_BYTES", 1_000_000)
    with pytest.raises(BadImage, match=r"^clipboard: larger than 1 MB$"):
        open_clipboard(ALL)


WL_PASTE = """case "$*" in
--list-types) printf 'text/html\\nimage/tiff\\nimage/png\\n';;
'--no-newline --type image/png') cat {0};;
*) exit 1;; esac"""


def test_on_wayland(drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for its programs, which read the picture from a file."""
    folder, monitor = tmp_path / "bin", tmp_path / "monitor.png"
    Image.new("RGB", (40, 30), "green").save(monitor)
    for name, value in {"WAYLAND_DISPLAY": "w", "PATH": f"{folder}:/bin", "XDG_CURRENT_DESKTOP": "GNOME"}.items():
        monkeypatch.setenv(name, value)
    program(folder, "wl-paste", WL_PASTE.format(drawing))
    assert open_clipboard(ALL).pictures[0].sha256 == open_picture(str(drawing)).sha256
    program(folder, "gnome-screenshot", "exec sleep 1000")
    with monkeypatch.context() as patch, pytest.raises(InputMissing, match=r"not answer within 0.2 s$"):
        patch.setattr(limits, "SCREEN_SECONDS", 0.2)
        open_screen(ALL)
    program(folder, "gnome-screenshot", "echo 'not allowed' >&2; exit 1")
    with pytest.raises(InputMissing, match=r"^screen: gnome-screenshot takes no picture: not allowed$"):
        open_screen(ALL)
    program(folder, "grim", f'cat {monitor} > "$1"')  # the next one
    assert open_screen(ALL).pictures[0].image == open_picture(str(monitor)).image
    program(folder, "gnome-screenshot", f'test "$1" = -f && cat {drawing} > "$2"')
    assert open_screen(ALL).pictures[0].image == open_picture(str(drawing)).image


def test_the_screen(display: str, run: Run, tmp_path: Path) -> None:
    (picture,) = open_screen(ALL).pictures
    assert (picture.name, picture.image) == ("screen", Image.new("RGB", (WIDTH, HEIGHT), "white"))
    view = tmp_path / "view.png"
    result = run("prompt", "--screen", "--region", "0,0,50%,50%", "what is this?", "--save-view", view)
    assert (result.exit_code, result.stdout) == (0, "USER: <image>\nwhat is this? ASSISTANT:\n")
    shown = Image.open(view).convert("RGB")
    assert shown.getpixel((shown.width // 2, shown.height // 2)) == (255, 255, 255)


@for_each("system", ["darwin", "win32"])
def test_other_systems(system: str, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Pillow finds there: a picture's file, its own bitmap, files, or nothing."""
    from PIL import ImageGrab

    file = io.BytesIO(drawing.read_bytes())
    monkeypatch.setattr("sys.platform", system)
    for found in (Image.open(file, formats=["PNG"]), Image.open(drawing).convert("RGB"), [str(drawing)]):
        monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: found)  # noqa: B023
        assert open_clipboard(ALL).pictures[0].image == open_picture(str(drawing)).image
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: None)
    with pytest.raises(InputMissing, match=r"^clipboard: has no picture$"):
        open_clipboard(ALL)
