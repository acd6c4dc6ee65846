"""The test half of easy-VQA as a questions file: `python examples/questions_file.py > easy-vqa.jsonl`.

Needs: `pip install easy-vqa==1.0`. Then: `llava batch easy-vqa.jsonl -o easy-vqa-answers.jsonl`.
"""

from __future__ import annotations

import json
from pathlib import Path

import easy_vqa

folder = Path(easy_vqa.__file__).parent / "data" / "test"
for number, (question, answer, picture) in enumerate(json.loads((folder / "questions.json").read_text()), 1):
    image = str(folder / "images" / f"{picture}.png")
    print(json.dumps({"id": number, "image": image, "question": question, "answer": answer}))
