"""The recipe in examples/ trains what the loader loads, on the very tokens that the command makes."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
import torch
from helpers.command import Run
from helpers.tables import for_each

RECIPE = Path(__file__).parents[2] / "examples" / "builtin"
sys.path.insert(0, str(RECIPE))

import batches  # noqa: E402
import model  # noqa: E402
import questions  # noqa: E402
import samples  # noqa: E402
import scenes  # noqa: E402
import train  # noqa: E402


def test_training_tokens_are_the_commands() -> None:
    processor = model.make_processor()
    for seed in range(20):
        sample = samples.drawing(Random(seed), 6)
        messages = []
        for i, (_, question, answer) in enumerate(sample.turns):
            image = [] if i else [{"type": "image"}]
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = processor.apply_chat_template(messages)
        expected = processor(text=text, images=[sample.image], return_tensors="pt")["input_ids"][0].tolist()
        row = batches.Row(processor.tokenizer)
        row.add(sample.turns)
        assert row.ids == expected
        assert row.positions == list(range(len(expected)))
        answers = [label for label in row.labels if label != -100]
        assert processor.tokenizer.decode(answers).split("</s>")[:-1] == [f" {a}" for _, _, a in sample.turns]


def test_questions_that_stand_apart_are_read_as_if_each_were_the_first() -> None:
    processor = model.make_processor()
    sample = samples.drawing(Random(1), 6)
    before = samples.drawing(Random(2), 2)
    apart = batches.Row(processor.tokenizer)
    apart.add(before.turns)
    apart.add(sample.turns, apart=True)
    for part, turn in enumerate(sample.turns, 1):
        alone = batches.Row(processor.tokenizer)
        alone.add(before.turns)
        alone.add([turn])
        seen = [i for i, p in enumerate(apart.parts) if p in (0, part)]
        assert [apart.ids[i] for i in seen] == alone.ids
        assert [apart.labels[i] for i in seen] == alone.labels
        assert [apart.positions[i] for i in seen] == alone.positions


def test_scenes_are_the_same_from_the_same_seed() -> None:
    one, two = samples.drawing(Random(3), 5), samples.drawing(Random(3), 5)
    assert one.image.tobytes() == two.image.tobytes()
    assert one.turns == two.turns != samples.drawing(Random(4), 5).turns


@for_each("kind", questions.KINDS)
def test_every_kind_of_question_has_a_sure_answer(kind: str) -> None:
    answers = set()
    for seed in range(200):
        rng = Random(f"{kind}/{seed}")
        if found := questions.question(scenes.random_scene(rng), kind, rng):
            answers.add(found[1])
    assert len(answers) > 1
    assert all(answers)


def test_both_stages_run_and_leave_a_checkpoint(
    run: Run, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is compiled computes the same, and compiling takes a minute.
    monkeypatch.setattr("torch._dynamo.config.disable", True)
    for stage in ("tower", "model"):
        words = ["train.py", stage, "--steps", "2", "--batch", "2", "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", words)
        train.main()
    torch.set_flush_denormal(False)
    result = run("ask", "-m", tmp_path / "checkpoint", drawing, "what is this?", "--max-tokens", "2")
    assert result.exit_code == 0
