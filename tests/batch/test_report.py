"""`llava report`: the page of a batch's rows, in Chromium as a person has it, and what the command says."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run, Shell, missing
from helpers.rows import row, sha256, write
from helpers.tables import for_each
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from llava_cli import files, limits
from llava_cli.batch.report import report_page
from llava_cli.batch.report.report import report
from llava_cli.batch.report.report_pictures import PictureFolders, task_of

ROOT = Path(__file__).parents[2]
UNUSED = ("background-networking", "component-update", "sync")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", *(f"--disable-{name}" for name in UNUSED)]
HOSTILE = "</script><script>window.ran = 1; alert(1)</script><!--<script><img src=x onerror='window.ran=1;alert(2)'>\""
Open = Callable[[Path], Page]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = shutil.which("chromium")
    if not found:
        missing("there is no Chromium to open the page in: apt-get install -y chromium")
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("chromium"))}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=ARGS, env=environment, timeout=300_000)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a report. In the end nothing was asked of a network, nothing ran that is not ours, nothing went wrong."""
    requests: list[str] = []
    wrong: list[str] = []
    urls: list[str] = []
    context = browser.new_context(viewport={"width": 1000, "height": 800}, reduced_motion="reduce")
    context.set_default_timeout(120_000)
    expect.set_options(timeout=120_000)

    def open_page(path: Path) -> Page:
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        urls.append(path.as_uri())
        page.goto(urls[-1])
        return page

    yield open_page
    assert not wrong
    assert [url for url in requests if not url.startswith("data:image/")] == urls
    assert not any(page.evaluate("'ran' in window") for page in context.pages)
    context.close()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 5,003 rows: all about one picture, of which each tenth is flagged and each 1,000th failed."""
    folder = tmp_path_factory.mktemp("many")
    Image.new("RGB", (40, 30), "teal").save(folder / "a.png")
    rows = []
    for n in range(1, 5004):
        flags = [("empty", "repeated", "cut_off", "echoes_prompt")[n // 10 % 4]] if n % 10 == 0 else []
        rows.append(row("a.png", None if n % 1000 == 0 else f"answer {n}", f"question {n}"))
        rows[-1] |= ({"flags": flags} if flags else {}) | ({"expected": "1", "right": n == 1} if n <= 4 else {})
    report(write(folder / "out.jsonl", *rows), folder / "out.html", quiet=True)
    return folder / "out.html"


def numbers(page: Page) -> list[int]:
    """Which rows are on the page, by the numbers in front of their names."""
    return [int(text.split(" ")[0]) for text in page.locator("article .name").all_text_contents()]


def at_row(page: Page, number: int) -> None:
    """Waits until the row of this number has the focus."""
    expect(page.locator("article:focus .name")).to_have_text(re.compile(rf"^{number} · "))


def test_five_thousand_rows_draw_few(many: Path, opened: Open) -> None:
    page = opened(many)
    expect(page.locator("article").first).to_be_in_viewport()
    expect(page.locator("#counts")).to_have_text("5,003 rows · 5,003 shown · 5 errors · accuracy 25.00 % (1 of 4)")
    expect(page).to_have_title("out.jsonl")
    assert numbers(page) == list(range(1, 51))
    assert page.evaluate("document.querySelectorAll('*').length") < 1000
    assert page.evaluate("document.documentElement.outerHTML.length") < 200_000  # the other rows' data is not there
    assert page.locator("article img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40


def test_search(many: Path, opened: Open) -> None:
    page = opened(many)
    page.keyboard.press("/")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("QUESTION 77")
    assert numbers(page) == [77, *range(770, 780)]
    expect(page.locator("#counts")).to_contain_text("11 shown")
    page.keyboard.press("Enter")
    at_row(page, 77)
    page.keyboard.press("/")
    page.keyboard.type("no such row")
    expect(page.locator("#rows")).to_have_text("No row fits.")
    page.keyboard.press("Escape")
    expect(page.locator("#search")).to_have_value("")
    expect(page.locator("#counts")).to_contain_text("5,003 shown")
    page.keyboard.press("Escape")
    expect(page.locator("#search")).not_to_be_focused()


@for_each(
    "name, first",
    [
        ("errors 5", [1000, 2000, 3000, 4000, 5000]),
        ("wrong 3", [2, 3, 4]),
        ("empty 125", [40, 80, 120]),
        ("repeated 125", [10, 50, 90]),
        ("cut off 125", [20, 60, 100]),
        ("echoes prompt 125", [30, 70, 110]),
    ],
    own=(opened,),
)
def test_filters(many: Path, opened: Open, name: str, first: list[int]) -> None:
    page = opened(many)
    button = page.get_by_role("button", name=name, exact=True)
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    assert numbers(page)[: len(first)] == first
    expect(page.locator("#counts")).to_contain_text(f"{name.rpartition(' ')[2]} shown")
    page.keyboard.press("Space")
    expect(page.locator("#counts")).to_contain_text("5,003 shown")


def test_filters_join_and_the_search_narrows_them(many: Path, opened: Open) -> None:
    page = opened(many)
    page.get_by_role("button", name="errors").click()
    page.get_by_role("button", name="wrong").click()
    assert numbers(page) == [2, 3, 4, 1000, 2000, 3000, 4000, 5000]
    page.locator("#search").fill("question 2")
    assert numbers(page) == [2, 2000]


def weather(number: int, best: float, **more: Any) -> dict[str, Any]:
    rest = (1 - best) / 2
    probabilities = {"sunny": best, "rain": rest, "snow": rest}
    return row(f"{number}.png", "sunny", probabilities=probabilities, answer_probability=0.9, threshold=0.75, **more)


def sort(page: Page, measure: str) -> None:
    page.get_by_label("Sort").select_option(measure)


def test_probabilities_are_bars_with_the_threshold(tmp_path: Path, opened: Open) -> None:
    """As wide as they say, the mark where the threshold is; rows are sorted and filtered by what they are sure of."""
    escalated = {"model": "larger", "answer": "rain"}
    lost = {"model": "larger", "error": {"type": "ServerFailed", "message": "does not answer"}}
    many = {f"choice {number}": 1 / 8 for number in range(8)}
    rows = [
        weather(1, 0.9),
        weather(2, 0.6, flags=["unsure"], guess="sunny"),
        weather(3, 0.5, escalated=escalated),
        weather(4, 0.7, flags=["unsure", "blind"], escalated=lost),
        row("5.png", "a long answer", confidence={"mean": 0.8, "lowest": 0.1, "lowest_token": " long"}, sight=-0.25),
        row("6.png", "choice 0", probabilities=many),
        row("7.png", "none"),
    ]
    report(write(tmp_path / "out.jsonl", *rows), tmp_path / "out.html", quiet=True)
    page = opened(tmp_path / "out.html")
    first = page.locator("article").first
    widths = first.locator(".track").evaluate_all("all => all.map(one => one.clientWidth)")
    filled = first.locator(".fill").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert [part / width for part, width in zip(filled, widths, strict=True)] == pytest.approx(
        [0.9, 0.05, 0.05], abs=0.01
    )
    assert first.locator(".mark").evaluate("one => one.style.left") == "75%"
    expect(first.locator(".bars")).to_contain_text("0.900")
    expect(page.locator("article .mark")).to_have_count(4)
    expect(page.locator("article").nth(5)).to_contain_text("and 4 more")
    expect(page.locator("article").nth(2)).to_contain_text("larger: rain")
    expect(page.locator("article").nth(3)).to_contain_text("larger: failed: does not answer")
    for name, found in (("unsure 2", [2, 4]), ("blind 1", [4]), ("escalated 2", [3, 4])):
        button = page.get_by_role("button", name=name, exact=True)
        button.click()
        assert numbers(page) == found
        button.click()
    for measure, found in (("probability", [6, 3, 2, 4, 1]), ("mean confidence", [5]), ("sight", [5])):
        sort(page, measure)
        assert numbers(page) == found
    sort(page, "probability")
    page.get_by_label("at most").fill("0.6")
    assert numbers(page) == [6, 3, 2]
    page.keyboard.press("j")  # which is no number, and no key of the page's while one is typed
    assert numbers(page) == [6, 3, 2]
    page.get_by_role("button", name="unsure 2").click()
    assert numbers(page) == [2]
    sort(page, "in order")
    assert numbers(page) == [2, 4]
    expect(page.locator("#limit")).to_be_hidden()
    page.locator("article button").nth(1).click()
    for words in ("probabilities", "threshold", "0.75", "larger: failed", "probability of all choices"):
        expect(page.locator("#big")).to_contain_text(words)


def test_a_page_without_probabilities_has_nothing_to_sort_by(many: Path, opened: Open) -> None:
    page = opened(many)
    expect(page.locator("#order")).to_be_hidden()
    for name in ("unsure", "blind", "escalated"):
        expect(page.get_by_role("button", name=name)).to_have_count(0)


def test_keys_go_through_the_rows(many: Path, opened: Open) -> None:
    page = opened(many)
    page.keyboard.press("j")
    at_row(page, 1)
    page.keyboard.press("k")
    at_row(page, 1)
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    at_row(page, 3)
    page.keyboard.press("ArrowUp")
    at_row(page, 2)
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    expect(page.locator("article[tabindex='0']")).to_have_count(1)
    page.keyboard.press("ArrowRight")
    at_row(page, 51)
    page.keyboard.press("k")  # over the edge of a page
    at_row(page, 50)
    assert numbers(page)[0] == 1
    page.keyboard.press("End")
    at_row(page, 5003)
    assert numbers(page) == [5001, 5002, 5003]
    expect(page.locator("#place")).to_have_text(re.compile("^5,001.5,003 of 5,003$"))
    expect(page.get_by_role("button", name="Next page")).to_be_disabled()
    page.keyboard.press("j")
    at_row(page, 5003)
    page.keyboard.press("Home")
    at_row(page, 1)
    page.keyboard.press("Control+j")
    at_row(page, 1)
    assert page.locator("article").first.get_attribute("aria-posinset") == "1"
    assert page.locator("article").first.get_attribute("aria-setsize") == "5003"


def test_enlarging_a_row(many: Path, opened: Open) -> None:
    page = opened(many)
    big = page.locator("#big")
    for _ in range(2):
        page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(big).to_be_visible()
    expect(big).to_contain_text("2 · a.png")
    for words in ("question 2", "answer 2", "expected", "builtin", "wrong"):
        expect(big).to_contain_text(words)
    assert big.locator("img").bounding_box()["width"] > 200  # type: ignore[index]
    page.keyboard.press("j")
    expect(big).to_contain_text("3 · a.png")
    page.keyboard.press("Escape")
    expect(big).to_be_hidden()
    at_row(page, 3)
    page.keyboard.press("Enter")
    expect(big).to_be_visible()
    page.keyboard.press("Enter")  # Close has the focus
    expect(big).to_be_hidden()
    page.get_by_role("button", name="Enlarge row 5", exact=True).click()
    expect(big).to_contain_text("5 · a.png")
    page.keyboard.press("ArrowRight")
    expect(big).to_contain_text("51 · a.png")
    page.keyboard.press("Escape")
    at_row(page, 51)


def test_the_keys_are_told(many: Path, opened: Open) -> None:
    page = opened(many)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("next row")
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.get_by_role("button", name="Keys").click()
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#help")).to_be_hidden()


def test_rows_beyond_the_limits(
    many: Path, opened: Open, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened(many)
    expect(page.locator("#notes")).to_have_text(
        "Rows from 5,001 on are without thumbnails; llava report out.jsonl --from 5001 makes a page that has them."
    )
    page.keyboard.press("End")
    expect(page.locator("article")).to_have_count(3)
    for name in page.locator("article .none").all_inner_texts():
        assert name == "no thumbnails after row 5,000"
    page.keyboard.press("ArrowLeft")
    expect(page.locator("article img")).to_have_count(50)

    done = run("report", many.with_suffix(".jsonl"), "--from", "5001", "-o", tmp_path / "more.html")
    assert done.stderr == f"{tmp_path / 'more.html'}: 3 rows\n  Rows 5,001 to 5,003 of 5,003.\n"
    page = opened(tmp_path / "more.html")
    assert numbers(page) == [5001, 5002, 5003]
    expect(page.locator("article img")).to_have_count(3)

    monkeypatch.setattr(report_page, "MAX_ROWS", 4)
    assert run("report", many.with_suffix(".jsonl"), "--from", "2", "-o", tmp_path / "few.html").exit_code == 0
    page = opened(tmp_path / "few.html")
    assert numbers(page) == [2, 3, 4, 5]
    begins = "llava report out.jsonl --from 6 begins behind them."
    expect(page.locator("#notes")).to_have_text(f"Rows 2 to 5 of 5,003; {begins}")


def test_rows_are_shown_and_never_run(tmp_path: Path, run: Run, opened: Open) -> None:
    turned = "\u202eevil\u2066 \x1b[31m\x00 \u2028 \ud800 <b>bold</b> &lt;"
    more = {"id": HOSTILE, "model": HOSTILE, "flags": [HOSTILE], "expected": [HOSTILE, turned], "right": False}
    write(
        tmp_path / f"{HOSTILE.replace('/', '')}.jsonl",
        row(HOSTILE, HOSTILE, HOSTILE, **more),
        row(f"javascript:alert(1)\n{turned}", turned, turned, __proto__={"thumb": HOSTILE}),
        row("x", None, error={"type": HOSTILE, "message": HOSTILE}, sha256=HOSTILE),
        row("x", "y", probabilities={HOSTILE: 0.5, "a": "0.5", "b": float("nan"), "c": 7, "d": None}, threshold="0.5"),
        row("x", "y", probabilities=[1], escalated=HOSTILE, confidence={"mean": 2, "lowest": HOSTILE}, sight=[HOSTILE]),
        row("x", "y", guess=HOSTILE, escalated={"model": HOSTILE, "answer": HOSTILE}, answer_probability=HOSTILE),
        row("x", "y", escalated={"model": 7, "error": {"message": HOSTILE}}, probabilities={}, sight=float("inf")),
        row("x", "y", id=float("nan"), error="z", flags="empty", right="no", expected=1, answer_tokens=HOSTILE),
    )
    source = next(tmp_path.glob("*.jsonl"))
    assert run("report", source, "-o", tmp_path / "out.html").exit_code == 0
    text = (tmp_path / "out.html").read_text("utf-8")
    assert text.count("</script>") == 3  # about, rows, our own
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", text)
    page = opened(tmp_path / "out.html")
    expect(page.locator("h1")).to_have_text(source.name)
    expect(page.locator("article .answer").first).to_have_text(HOSTILE)
    expect(page.locator("article .question").first).to_have_text(HOSTILE)
    expect(page.locator("article .answer").nth(1)).to_have_text(
        r"\u202eevil\u2066 \u001b[31m\u0000 \u2028 \ud800 <b>bold</b> &lt;"
    )
    expect(page.locator("article .answer").nth(2)).to_have_text(f"{HOSTILE}: {HOSTILE}")
    expect(page.locator("article .name").nth(1)).to_contain_text(r"javascript:alert(1)\n\u202eevil")
    expect(page.locator("article .bars")).to_have_count(2)  # of the one good number, and of none
    expect(page.locator("article .bars").first).to_have_text(f"{HOSTILE}0.500")
    for _ in range(8):
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        expect(page.locator("#big")).to_be_visible()
        page.keyboard.press("Escape")
    assert page.locator("b, article script, article a, iframe").count() == 0


def test_the_policy_lets_nothing_else_run_or_load(many: Path, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(many.as_uri())
    refused = page.evaluate(
        """async () => {
          const seen = [];
          const told = new Promise(done => document.addEventListener("securitypolicyviolation", event => {
            if (seen.push(event.effectiveDirective) === 3) done();
          }));
          const put = (tag, more) => document.body.append(Object.assign(document.createElement(tag), more));
          put("script", { textContent: "window.ran = 1" });
          put("img", { src: "https://127.0.0.1:9/a.png" });
          put("link", { rel: "stylesheet", href: "https://127.0.0.1:9/a.css" });
          await told;
          return seen.sort();
        }"""
    )
    assert refused == ["img-src", "script-src-elem", "style-src-elem"]
    assert not page.evaluate("'ran' in window")
    page.close()


def test_pictures_that_are_not_what_they_were(tmp_path: Path, run: Run, opened: Open, drawing: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    good = shutil.copy(drawing, photos / "good.png")
    shutil.copy(drawing, photos / "changed.png")
    (photos / "text.png").write_text("no picture")
    (photos / "torn.png").write_bytes(drawing.read_bytes()[:-200])
    os.mkfifo(photos / "pipe.png")
    right = sha256(Path(good))
    source = write(
        tmp_path / "out.jsonl",
        *[row("good.png", sha256=right, question=f"{n}?") for n in range(2)],
        row("changed.png", sha256="0" * 64),
        row("gone.png", sha256=right),
        row("text.png"),
        row("torn.png"),
        row("pipe.png"),
        row("https://127.0.0.1:9/a.png"),
        row("nul\0.png"),
        row(str(good)),
        row("drawing.png"),  # not where the run had its pictures, but beside the rows
    )
    (tmp_path / "out.jsonl.run").mkdir()
    settings = {"root": str(photos), "allow_truncated": False}
    (tmp_path / "out.jsonl.run" / "settings.json").write_text(json.dumps(settings))
    done = run("report", source)
    assert done.exit_code == 0
    assert done.stdout == ""
    assert done.stderr == f"{tmp_path / 'out.html'}: 11 rows, 7 without their picture\n"
    page = opened(tmp_path / "out.html")
    expect(page.locator("article")).to_have_count(11)
    shown = [article.locator("img, .none") for article in page.locator("article").all()]
    assert [one.inner_text() for one in shown] == [
        "",
        "",
        "changed since it was asked about",
        "missing: no such file or directory",
        "cannot be opened: not an image",
        "cannot be opened: truncated",
        "missing: not a regular file",
        "a URL: not fetched",
        "missing: embedded null byte",
        "",
        "",
    ]
    sizes = page.locator("article img").evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes == [[160, 107]] * 4


def test_pictures_without_a_run_beside_the_rows(tmp_path: Path, run: Run, opened: Open, drawing: Path) -> None:
    (tmp_path / "out.jsonl.run").mkdir()
    (tmp_path / "out.jsonl.run" / "settings.json").write_text("[1]")
    (tmp_path / "b.png").write_bytes(drawing.read_bytes()[:-200])
    source = write(tmp_path / "out.jsonl", row("drawing.png"), row("b.png"))
    assert run("report", source).stderr.endswith("2 rows, 1 without their picture\n")
    settings = {"root": str(tmp_path), "allow_truncated": True}
    (tmp_path / "out.jsonl.run" / "settings.json").write_text(json.dumps(settings))
    assert run("report", source).stderr.endswith("2 rows\n")  # what the batch took, the page takes
    expect(opened(tmp_path / "out.html").locator("article img")).to_have_count(2)


def test_what_of_a_file_was_looked_at(tmp_path: Path, run: Run, opened: Open, drawing: Path) -> None:
    """Its page, time and region by name, the region alone as its thumbnail, and the question with its fields."""
    pixels = "140,60,260,150"
    source = write(
        tmp_path / "out.jsonl",
        row("drawing.png", region="50%,0,100%,100%", sha256=sha256(drawing)),
        row("drawing.png", region=pixels, sha256=sha256(drawing), question="{name}?", asked="drawing?"),
        row("gone.pdf", page=12),
        row("gone.mp4", time=3675.25),
        row("gone.png", page="1", time=-1, region="<b>", asked=7),
        row("a #?%.png", asked="what is this?"),
    )
    shutil.copy(drawing, tmp_path / "a #?%.png")
    (tmp_path / "pages").mkdir()
    assert run("report", source, "-o", tmp_path / "pages" / "out.html").exit_code == 0
    page = opened(tmp_path / "pages" / "out.html")
    assert page.locator("article .name").all_text_contents() == [
        "1 · drawing.png · region 50%,0,100%,100%",
        f"2 · drawing.png · region {pixels}",
        "3 · gone.pdf · page 12",
        "4 · gone.mp4 · time 1:01:15.25",
        "5 · gone.png",
        "6 · a #?%.png",
    ]
    expect(page.locator("article .question").nth(1)).to_have_text("drawing?")
    sizes = page.locator("article img").evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes == [[120, 160], [120, 90], [160, 107]]
    page.locator("#search").fill("page 12")
    assert numbers(page) == [3]
    page.keyboard.press("Escape")
    page.locator("article button").nth(1).click()
    expect(page.locator("#big")).to_contain_text("{name}?")
    for links in (1, 0, 0, 0):
        expect(page.locator("#big a")).to_have_count(links)
        page.keyboard.press("j")
    link = page.locator("#big").get_by_role("link", name="Open a #?%.png")
    assert link.evaluate("link => link.href") == (tmp_path / "a #?%.png").as_uri()
    assert "question as given" not in page.locator("#big").inner_text()


@for_each(
    "place, link",
    [
        ({"page": 2}, "drawing.png#page=2"),
        ({"time": 12.5}, "drawing.png#t=12.5"),
        ({"region": "0,0,1,1"}, "drawing.png"),
        ({"page": 0}, "drawing.png"),
    ],
)
def test_a_link_leads_to_what_was_looked_at(place: dict[str, Any], link: str, drawing: Path) -> None:
    folders = PictureFolders.of(drawing.with_name("out.jsonl"))
    assert folders.link(task_of(row("drawing.png", **place)), drawing.with_name("out.html")) == link


def test_light_and_dark(many: Path, browser: Browser) -> None:
    ground = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(many.as_uri())
        ground[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()
    assert ground == {"light": "rgb(247, 247, 248)", "dark": "rgb(19, 20, 22)"}


def test_a_batch_and_its_report(tmp_path: Path, run: Run, opened: Open) -> None:
    asked = [{"image": "shapes.png", "question": "how many shapes are there?", "answer": n} for n in (3, "3.")]
    write(tmp_path / "questions.jsonl", {**asked[0], "id": 1}, {**asked[1], "id": "two"})
    out = tmp_path / "out.jsonl"
    assert run("batch", tmp_path / "questions.jsonl", "--root", ROOT / "examples", "-q", "-o", out).exit_code == 0
    assert run("report", "-q", out).stderr == ""
    page = opened(tmp_path / "out.html")
    expect(page.locator("#counts")).to_have_text("2 rows · 2 shown · 0 errors · accuracy 100.00 % (2 of 2)")
    expect(page.locator("article .answer")).to_have_text(["3", "3"])
    expect(page.locator("article img")).to_have_count(2)
    expect(page.locator("#filters button", has_text="wrong 0")).to_be_disabled()
    expect(page.locator("#models")).to_have_text("answered by builtin")


def test_a_torn_last_line_is_left_out(tmp_path: Path, run: Run, opened: Open) -> None:
    source = write(tmp_path / "out.jsonl", row("a"), row("b"))
    source.write_bytes(source.read_bytes()[:-20])
    done = run("report", source)
    assert done.exit_code == 0
    assert f"{source}: its last line is not whole and left out" in done.stderr
    assert f"{tmp_path / 'out.html'}: 1 row" in done.stderr
    assert run("report", "-q", source).stderr == ""
    assert numbers(opened(tmp_path / "out.html")) == [1]
    source.write_bytes(source.read_bytes().splitlines()[0])  # only its end is missing: nothing is torn
    assert "not whole" not in run("report", source).stderr
    source.write_bytes(b"")
    assert run("report", source).exit_code == 0
    expect(opened(tmp_path / "out.html").locator("#rows")).to_have_text("There are no rows.")


@for_each(
    "line",
    [
        b"not JSON",
        b"\xff\xfe\x00",
        b"[]",
        b"1",
        b"",
        b"{}",
        b'{"image": "a", "question": "b", "answer": "c"}',
        b'{"image": "a", "question": "b", "answer": null, "status": "ok"}',
        b'{"image": 1, "question": "b", "answer": "c", "status": "ok"}',
        b'{"image": "a", "question": "b", "answer": "c", "status": []}',
        b'{"image": "a", "que',
    ],
)
def test_what_is_no_file_of_rows(tmp_path: Path, run: Run, line: bytes) -> None:
    source = write(tmp_path / "out.jsonl", row("a"))
    source.write_bytes(source.read_bytes() + line + b"\n" + source.read_bytes())
    done = run("report", source)
    assert (done.exit_code, done.stdout) == (65, "")
    assert done.stderr.splitlines() == [
        f"llava: {source}, line 2: not a row of llava batch",
        "  llava batch photos/ QUESTION -o out.jsonl",
    ]
    assert not (tmp_path / "out.html").exists()


def test_what_cannot_be_read_or_written(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "out.jsonl", row("a"))
    page = tmp_path / "page.html"
    page.write_text("what was there")
    os.mkfifo(tmp_path / "pipe")
    for args, code, reason in [
        ([tmp_path / "gone.jsonl"], 66, "gone.jsonl: no such file or directory"),
        ([tmp_path], 66, ": is a directory"),
        *(([name], 66, "llava: ") for name in (".", "..", "/", "")),
        (["/dev/null"], 66, "/dev/null: not a regular file"),
        ([source, "-o", tmp_path / "no" / "out.html"], 73, "out.html: no such folder"),
        ([source, "-o", tmp_path], 73, ": is a directory"),
        ([source, "-o", tmp_path / "pipe"], 73, "pipe: not a regular file"),
        ([source, "-o", source], 2, "-o: "),
        ([source, "--from", "2"], 2, "--from: the last row is 1"),
        ([source, "--from", "0"], 2, "report: "),
        ([], 2, "report: "),
    ]:
        done = run("report", *args)
        assert (done.exit_code, done.stdout) == (code, "")
        first, hint = done.stderr.splitlines()
        assert first.startswith("llava: ") and reason in first
        assert hint.startswith("  ")
    monkeypatch.setattr(files, "write_all", lambda descriptor, data: os.write(os.open("/dev/full", os.O_WRONLY), data))
    done = run("report", source, "-o", page)
    assert done.exit_code == 74
    assert done.stderr.splitlines()[0] == f"llava: {page}: no space left on device"
    assert page.read_text() == "what was there"
    assert not list(tmp_path.glob("*.new"))


@for_each(
    "target, output",
    itertools.product(["real.html", "nowhere.html", "it's.html", "a\x1b[2J\nb.html"], [None, "page.html"]),
)
def test_an_output_that_is_a_link_is_refused(
    output: str | None, target: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one that nobody has named, beside rows of anybody's; and nothing is written where it leads."""
    folder = tmp_path / "set"
    folder.mkdir()
    source = write(folder / "out.jsonl", row("a"))
    link = folder / (output or "out.html")
    link.symlink_to(target)
    (folder / "real.html").write_text("mine")
    words = [] if output is None else ["-o", link]
    done = run("report", source, *words)
    assert (done.exit_code, done.stdout) == (73, "")
    shown = target.encode("unicode_escape").decode() if not target.isprintable() else target
    hint = f"-o {files.quoted(folder / target)} writes there"
    assert done.stderr.splitlines() == [f"llava: {link}: is a link to {shown}", f"  {hint}"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["out.jsonl", link.name, "real.html"])
    assert (folder / "real.html").read_text() == "mine"
    assert run("report", source, "-o", folder / target).exit_code == 0
    assert (folder / target).read_text("utf-8").startswith("<!doctype html>")


@for_each("what", ["link to a folder", "fifo", "folder", "loop"])
def test_a_default_output_that_is_no_file(what: str, tmp_path: Path, run: Run) -> None:
    source = write(tmp_path / "out.jsonl", row("a"))
    page = tmp_path / "out.html"
    if what in ("link to a folder", "loop"):
        page.symlink_to("." if what != "loop" else "out.html")
    else:
        {"fifo": os.mkfifo, "folder": os.mkdir}[what](page)
    before = sorted(tmp_path.rglob("*"))
    done = run("report", source)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (73, "", 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_keeps_who_may_read_it(tmp_path: Path, run: Run) -> None:
    source = write(tmp_path / "out.jsonl", row("a"))
    assert run("report", source).exit_code == 0
    (tmp_path / "out.html").chmod(0o640)
    assert run("report", source).exit_code == 0
    assert (tmp_path / "out.html").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("x" * 60_000, "larger than 50,000 bytes"),
        ([0] * 2000, "more than 1,000 values"),
        (functools.reduce(lambda inner, _: [inner], range(limits.ROW_DEPTH), 0), "nested deeper than 64 levels"),
    ],
    ids=["bytes", "items", "depth"],
)
def test_rows_that_are_too_much(
    value: Any, reason: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ROW_BYTES", 50_000)
    monkeypatch.setattr(limits, "ROW_ITEMS", 1000)
    source = write(tmp_path / "out.jsonl", row("a"), row("b", x=value), row("c"))
    done = run("report", source)
    assert (done.exit_code, done.stdout) == (65, "")
    assert done.stderr.splitlines()[0] == f"llava: {source}, line 2: {reason}"


def test_rows_without_an_end(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many GB, of which no more is read than a line may have; and a FIFO that nobody writes into."""
    monkeypatch.setattr(limits, "ROW_BYTES", 100_000)
    source = write(tmp_path / "out.jsonl", row("a"))
    os.truncate(source, 1 << 36)
    assert run("report", source).stderr.startswith(f"llava: {source}, line 2: larger than 100,000 bytes\n")
    os.mkfifo(tmp_path / "fifo.jsonl")
    done = run("report", tmp_path / "fifo.jsonl")
    assert (done.exit_code, "not a regular file" in done.stderr) == (66, True)


def test_the_page_goes_beside_the_rows(tmp_path: Path, run: Run) -> None:
    pages = {"a.jsonl": "a.html", "a.b.jsonl": "a.b.html", "rows": "rows.html", "x.txt": "x.txt.html"}
    for name, page in pages.items():
        assert run("report", write(tmp_path / name, row("a"))).exit_code == 0
        assert (tmp_path / page).is_file()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "out.jsonl", *(row("a", f"{n} " + 2000 * "x") for n in range(10_000)))
    monkeypatch.setattr(report_page, "MAX_THUMBNAILS", 0)
    tracemalloc.start()
    report(source, tmp_path / "out.html", quiet=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out.html").stat().st_size > 20_000_000
    assert peak < 5_000_000


def test_no_model_library_is_loaded(tmp_path: Path, shell: Shell) -> None:
    source = write(tmp_path / "out.jsonl", row("a"))
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was imported')")
    done = shell("report", source, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 0, done.stderr
