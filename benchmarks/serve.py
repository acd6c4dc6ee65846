"""`llava serve` with the built-in model: `python benchmarks/serve.py`. A minute on two cores.

Answers a second of requests one after another and of eight at once, in turn; what a command takes, from its start to
its first token, beyond the engine's own time. `--load MINUTES` asks for so long instead, many at once, one in twenty no
good, in fp32: every answer is held against that of an engine here, and the server's memory is told every minute.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "builtin"))
import samples

from llava_cli import Conversation, load, open_picture
from llava_cli.engine.remote.local_socket import UnixHTTPConnection, server_info

QUESTIONS = ("what is this?", "what color is the background?", "how many shapes are there?")
AT_ONCE = 8


def picture(number: int) -> bytes:
    drawing = samples.drawing(Random(f"serve/{number}"), 0, most=4, crowded=0, numbers=0)
    drawing.image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def ask(path: Path, data: bytes, question: str) -> tuple[int, str]:
    """The status and the answer, or what is wrong."""
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    connection = UnixHTTPConnection(path, 600)
    body = json.dumps({"messages": [{"role": "user", "content": content}]})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    said = json.loads(response.read())
    connection.close()
    return response.status, said["choices"][0]["message"]["content"] if response.status == 200 else str(said["error"])


def rates(path: Path, runs: int, count: int) -> None:
    """Every picture is a new one: nothing of it has been read before."""
    ratios = []
    for run in range(runs):
        seconds = []
        for way, workers in enumerate((1, AT_ONCE)):
            pictures = [picture((2 * run + way) * count + number) for number in range(count)]
            with ThreadPoolExecutor(workers) as threads:
                begin = time.perf_counter()
                told = list(threads.map(lambda data: ask(path, data, QUESTIONS[0])[0], pictures))
                seconds.append(time.perf_counter() - begin)
            assert set(told) == {200}
        ratios.append(seconds[0] / seconds[1])
        print(
            f"{count / seconds[0]:.1f} answers/s one by one, {count / seconds[1]:.1f} eight at once: {ratios[-1]:.2f}"
        )
    print(f"median {statistics.median(ratios):.2f}")


def thin(folder: Path, runs: int) -> None:
    """A command's own time: until its first letter is there, less what the server took for it."""
    (folder / "picture.png").write_bytes(picture(0))
    command = [sys.executable, "-m", "llava_cli", "ask", "-q", "--stats", str(folder / "picture.png"), QUESTIONS[0]]
    extra = []
    for _ in range(runs):
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        first = time.perf_counter() - begin
        process.stdout.read()
        said = process.stderr.read().decode()
        assert "llava serve" in said
        extra.append(first - float(said.partition("first token ")[2].partition(" s")[0]))
        process.wait()
    print(f"a command's own time until the first token: {statistics.median(extra):.3f} s (median of {runs})")


def load_for(path: Path, minutes: float) -> None:
    said = server_info(path)
    assert said
    process, engine = psutil.Process(said["pid"]), load("builtin", precision=said["precision"], device="cpu")
    pictures = [picture(number) for number in range(40)]
    with tempfile.TemporaryDirectory() as name:
        expected = []
        for number, data in enumerate(pictures):
            (file := Path(name) / f"{number}.png").write_bytes(data)
            expected.append([engine.answer(Conversation().ask(q, [open_picture(str(file))])).text for q in QUESTIONS])
    until, counts = time.monotonic() + 60 * minutes, {"right": 0, "wrong": 0, "refused": 0}

    def go_on(seed: int) -> None:
        rng = Random(seed)
        while time.monotonic() < until:
            number, which = rng.randrange(len(pictures)), rng.randrange(len(QUESTIONS))
            if rng.random() < 0.05:
                assert ask(path, pictures[number][: rng.randrange(200)], QUESTIONS[which])[0] == 400
                counts["refused"] += 1
            else:
                told = ask(path, pictures[number], QUESTIONS[which])
                counts["right" if told == (200, expected[number][which]) else "wrong"] += 1

    with ThreadPoolExecutor(AT_ONCE) as threads:
        asking = [threads.submit(go_on, seed) for seed in range(AT_ONCE)]
        begin = time.monotonic()
        while any(not one.done() for one in asking):
            print(f"{time.monotonic() - begin:5.0f} s: {process.memory_info().rss / 1e6:.0f} MB, {counts}", flush=True)
            time.sleep(min(60, max(1, until - time.monotonic())))
        for one in asking:
            one.result()
    print(f"at the end: {process.memory_info().rss / 1e6:.0f} MB, {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--count", type=int, default=64, help="requests of each kind and run")
    parser.add_argument("--load", type=float, metavar="MINUTES")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["LLAVA_SOCKET"] = str(path := Path(name) / "server.sock")
        serve = [sys.executable, "-m", "llava_cli", "serve"]
        # In fp32 an answer does not depend on those that are made beside it.
        precision = ["-p", "fp32"] if args.load else []
        subprocess.run([*serve, "--detach", "--port", "0", *precision], check=True)
        try:
            ask(path, picture(-1), QUESTIONS[0])
            if args.load:
                load_for(path, args.load)
            else:
                rates(path, args.runs, args.count)
                thin(Path(name), args.runs)
        finally:
            subprocess.run([*serve, "--stop"], check=True)


if __name__ == "__main__":
    main()
