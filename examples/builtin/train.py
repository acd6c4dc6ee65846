"""Trains the model that ships inside the package: a LLaVA of 6 M parameters that knows drawings.

    python examples/builtin/train.py tower     # 9 minutes on 2 cores: vision tower, projector, words
    python examples/builtin/train.py model     # the rest of 90 minutes: all of it

The first command teaches the tower to say what is on each patch of crowded scenes; without it the
whole model takes several times as long to find out what a shape is. The second trains tower, projector
and decoder together on conversations: up to nine questions about a picture in one sequence, with
`</s>` after each answer as in LLaVA-1.5 (arXiv 2310.03744). Both are seeded and keep a checkpoint
in `--out`; the second leaves a folder there that `llava ask -m FOLDER` loads.

Needs: `pip install -c constraints.txt '.[train]'` (easy-vqa, scikit-image).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import scenes
import torch
from PIL import Image
from scenes import COLORS, NUMBER, SHAPES, Sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

SIDE, PATCH = 64, 8
GRID = SIDE // PATCH
WORDS = (
    (*SHAPES, NUMBER),
    tuple(COLORS),
    ("top", "center", "bottom"),
    ("left", "center", "right"),
    (*COLORS, "pale"),
)
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %} "
    "{% elif m.role == 'user' %}USER: "
    "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}"
    "{% else %} ASSISTANT:{% for c in m.content if c.type == 'text' %} {{ c.text }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


# ---------------------------------------------------------------- the model


def image_processor() -> LlavaImageProcessorPil:
    """Pads to a square of grey and resizes, so that the whole of any picture is seen."""
    half = [0.5, 0.5, 0.5]
    size = {"height": SIDE, "width": SIDE}
    return LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size=size, crop_size=size, image_mean=half, image_std=half
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 640 tokens, trained on what the generator asks."""
    rng, lines = Random(0), []
    for _ in range(6000):
        lines += [f"USER: \n{q} ASSISTANT: {a}" for _, q, a in scenes.drawing(rng, 9).turns]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor(),
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """CLIP tower 6 x 192 on 8 x 8 patches, two-layer projector, Llama decoder 4 x 256."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # torch's fused attention is slower backwards at this size
    return model


def pixels(images: list[Image.Image], processor: LlavaImageProcessorPil) -> torch.Tensor:
    """Pictures -> float [n, 3, 64, 64], exactly as the command prepares them."""
    return processor(images, return_tensors="pt").pixel_values


# ---------------------------------------------------------------- data in a process beside the model


def stream(batch: object, seed: int, first: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches number `first`, `first`+1, … of an endless seeded series, made ahead of need."""

    class Series(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
            torch.set_num_threads(1)
            step = first
            while True:
                yield batch(Random(f"{seed}/{step}"), step)  # type: ignore[operator]
                step += 1

    loader = torch.utils.data.DataLoader(Series(), batch_size=None, num_workers=1, prefetch_factor=8)
    return iter(loader)


class PatchBatch:
    """Crowded scenes: pixels, and for each patch what `Patches` asks of it."""

    def __init__(self, size: int) -> None:
        self.size, self.processor = size, image_processor()

    def __call__(self, rng: Random, step: int) -> tuple[torch.Tensor, ...]:
        images, labels, places, masks = [], [], [], []
        middle = (np.arange(GRID) + 0.5) / GRID
        for _ in range(self.size):
            scene = scenes.random_scene(rng, most=9, least=5 if rng.random() < 0.85 else 1, wide=0.2)
            images.append(scenes.draw(scene, rng))
            owner = scenes.owners(scene, SIDE).reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3)
            label, place = np.full((len(WORDS), GRID * GRID), -100), np.zeros((GRID * GRID, 3), np.float32)
            for patch, owned in enumerate(owner.reshape(GRID * GRID, PATCH * PATCH)):
                counts = np.bincount(owned, minlength=1)[1:]
                if not counts.any():
                    label[4, patch] = WORDS[4].index(scene.background)
                elif counts.max() >= 6:
                    thing = scene.things[int(counts.argmax())]
                    row, column = int(thing.y / scene.height * 3), int(thing.x / scene.width * 3)
                    label[:4, patch] = WORDS[0].index(thing.shape), WORDS[1].index(thing.color), row, column
                    x, y = thing.x + (1 - scene.width) / 2, thing.y + (1 - scene.height) / 2
                    place[patch] = x - middle[patch % GRID], y - middle[patch // GRID], thing.radius
            labels.append(label)
            places.append(place * GRID)
            masks.append(owner.reshape(GRID * GRID, PATCH * PATCH) > 0)
        return (
            pixels(images, self.processor),
            torch.from_numpy(np.stack(labels)),
            torch.from_numpy(np.stack(places)),
            torch.from_numpy(np.stack(masks)).float(),
        )


class ModelBatch:
    """Conversations: pixels, input ids, labels (answers and `</s>` only), right-padded.

    The first third of `steps` goes from one shape a picture to six: to look for a thing among many is
    learned in minutes by a model that can already compare a question with one thing, and hardly
    at all by one that cannot.
    """

    def __init__(self, size: int, easy: list[tuple[Path, list[tuple[str, str, str]]]], steps: int) -> None:
        self.size, self.easy, self.steps = size, easy, steps
        self.processor, self.photos = image_processor(), scenes.load_photos(scenes.PHOTOS_TRAIN)
        self.tokenizer = make_tokenizer()

    def sample(self, rng: Random, count: int, done: float) -> Sample:
        pick = rng.random()
        if pick < (0.16 if done > 0.1 else 0.40):
            path, asked = rng.choice(self.easy)
            with Image.open(path) as image:
                return Sample(image.convert("RGB"), rng.sample(asked, min(count, len(asked))))
        if pick > 0.93:
            return scenes.no_drawing(self.photos, min(count, 3), rng)
        return scenes.drawing(rng, count, most=min(6, 1 + int(done * 18)), crowded=0.12 if done > 0.3 else 0)

    def __call__(self, rng: Random, step: int) -> tuple[torch.Tensor, ...]:
        count, size = (18, self.size // 2) if rng.random() < 0.03 else (9, self.size)
        images, rows = [], []
        for _ in range(size):
            two = rng.random() < 0.10
            ids, labels = [self.tokenizer.bos_token_id], [-100]
            for _ in range(2 if two else 1):
                sample = self.sample(rng, max(1, count // 2) if two else count, step / self.steps)
                images.append(sample.image)
                add(self.tokenizer, sample.turns, ids, labels)
            rows.append((ids, labels))
        return pixels(images, self.processor), *pack(rows, self.tokenizer.pad_token_id)


def pack(rows: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Rows of (ids, labels) -> long [2, rows, longest]: ids padded with `pad`, labels with -100, on the right."""
    out = torch.full((2, len(rows), max(len(ids) for ids, _ in rows)), -100)
    out[0] = pad
    for i, row in enumerate(rows):
        for j in range(2):
            out[j, i, : len(row[j])] = torch.tensor(row[j])
    return out


def add(
    tokenizer: PreTrainedTokenizerFast, asked: list[tuple[str, str, str]], ids: list[int], labels: list[int]
) -> None:
    """Appends the turns about one picture in the format of `TEMPLATE`, token by token."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    for i, (_, question, answer) in enumerate(asked):
        # Tokenised as the command does: the text around `<image>` and up to the end of the answer is one piece.
        text = f"{question} ASSISTANT:"
        if i == 0:
            before = tokenizer.encode("USER: ", add_special_tokens=False) + [image] * (GRID * GRID)
            ask = before + tokenizer.encode("\n" + text, add_special_tokens=False)
        else:
            ask = tokenizer.encode("USER: " + text, add_special_tokens=False)
        say = [*tokenizer.encode(" " + answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids += ask + say
        labels += [-100] * len(ask) + say


def easy_vqa(split: str) -> list[tuple[Path, list[tuple[str, str, str]]]]:
    """The pictures of easy-VQA's `train` or `test` half, each with its questions and answers."""
    import json

    import easy_vqa as package

    folder = Path(package.__file__).parent / "data" / split
    found: dict[int, list[tuple[str, str, str]]] = {}
    for question, answer, picture in json.loads((folder / "questions.json").read_text()):
        found.setdefault(picture, []).append(("easy-vqa", question, answer))
    return [(folder / "images" / f"{picture}.png", asked) for picture, asked in sorted(found.items())]


# ---------------------------------------------------------------- the two stages


def schedule(done: float) -> float:
    """Learning rate as a share of its peak: a short rise, then a cosine down to nothing."""
    return min(1.0, done / 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Patches(nn.Module):
    """What each patch is asked in stage one.

    In words, through the projector: the shape and the colour on it and which third of the picture that
    shape is in, or, where there is none, the background's colour. The classifiers' weights are the
    decoder's own embeddings of those words, so that stage two begins with pictures and words in one
    space (LLaVA's feature alignment, arXiv 2304.08485, without a language model to align to).
    Besides, for the tower alone: which of the patch's pixels are covered, how far away (in patches)
    the shape's centre is and how large its radius. These make it look beyond its edge for the whole
    shape, which is what is hard to learn.
    """

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.embeddings = model.get_input_embeddings()
        self.words = [[tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in words] for words in WORDS]
        self.place, self.mask = nn.Linear(192, 3), nn.Linear(192, PATCH * PATCH)

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, places: torch.Tensor, masks: torch.Tensor
    ) -> tuple[torch.Tensor, list[float]]:
        """images [n, 3, 64, 64], labels [n, 5, 64], places [n, 64, 3], masks [n, 64, 64] -> loss, shares right."""
        features = self.tower(images, output_hidden_states=True).hidden_states[-1][:, 1:]
        projected = self.projector(features).float()
        on = labels[:, 0] >= 0
        loss = nn.functional.smooth_l1_loss(self.place(features).float()[on], places[on])
        loss = loss + nn.functional.binary_cross_entropy_with_logits(self.mask(features).float(), masks)
        right = []
        for words, wanted in zip(self.words, labels.unbind(1), strict=True):
            scores = projected @ self.embeddings.weight[words].T
            loss = loss + nn.functional.cross_entropy(scores.transpose(1, 2), wanted)
            asked = wanted >= 0
            right.append((scores.argmax(2)[asked] == wanted[asked]).float().mean().item())
        return loss, right


def train_tower(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    size, steps, rate = args.batch or 32, args.steps or 2400, args.rate or 1.5e-3
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    patches = Patches(model, tokenizer)
    optimizer = torch.optim.AdamW(patches.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    start, batches = time.monotonic(), stream(PatchBatch(size), args.seed, 0)
    seen: list[list[float]] = []
    for step in range(steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = patches(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(patches.parameters(), 1.0)
        optimizer.step()
        seen.append([loss.item(), *right])
        if step % 50 == 49 or step + 1 == steps:
            mean = " ".join(f"{m:.3f}" for m in np.mean(seen[-50:], 0))
            took = time.monotonic() - start
            print(f"{step + 1} {took:.0f}s loss; shape, colour, row, column, background right: {mean}", flush=True)
            torch.save(model.state_dict(), args.out / "tower.pt")


def train_model(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    model.load_state_dict(torch.load(args.out / "tower.pt", weights_only=True))
    size, steps = args.batch or 16, args.steps or 9000
    slow = list(model.model.vision_tower.parameters())
    rest = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    groups = [{"params": rest, "share": 1.0}, {"params": slow, "share": 1 / 3}]
    optimizer = torch.optim.AdamW(groups, lr=7e-4, betas=(0.9, 0.98), weight_decay=0.05)
    first, resume = 0, args.out / "model.pt"
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    batches = stream(ModelBatch(size, easy_vqa("train"), steps), args.seed + 1, first)
    held_out = held_out_batches(size)
    start, losses = time.monotonic(), []
    for step in range(first, steps):
        images, ids, labels = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = 7e-4 * group["share"] * schedule(step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids, pixel_values=images).last_hidden_state
            at = labels[:, 1:] != -100  # only answers go through the head
            scores = model.lm_head(hidden[:, :-1][at]).float()
        loss = nn.functional.cross_entropy(scores, labels[:, 1:][at])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            took = time.monotonic() - start
            print(f"{step + 1} {took:.0f}s loss {np.mean(losses[-100:]):.4f}", flush=True)
        if step % 500 == 499 or step + 1 == steps:
            print(f"{step + 1} {right(model, held_out)}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, resume.with_suffix(".new"))
            resume.with_suffix(".new").replace(resume)
            save(model, processor, args.out / "checkpoint")


def held_out_batches(size: int) -> list[tuple[list[str], tuple[torch.Tensor, ...]]]:
    """Fresh scenes as packed batches, with the kind of each question, for a look at progress."""
    made, batch = [], ModelBatch(size, [], 1)
    for number in range(16):
        rng, images, rows, kinds = Random(f"held out/{number}"), [], [], []
        for i in range(size):
            sample = scenes.no_drawing(batch.photos, 2, rng) if i == 0 else scenes.drawing(rng, 6)
            ids, labels = [batch.tokenizer.bos_token_id], [-100]
            add(batch.tokenizer, sample.turns, ids, labels)
            images.append(sample.image)
            rows.append((ids, labels))
            kinds += [kind for kind, _, _ in sample.turns]
        made.append((kinds, (pixels(images, batch.processor), *pack(rows, batch.tokenizer.pad_token_id))))
    return made


@torch.no_grad()
def right(model: LlavaForConditionalGeneration, batches: list[tuple[list[str], tuple[torch.Tensor, ...]]]) -> str:
    """Share of answers that greedy decoding would get right to the letter, by kind of question."""
    asked: Counter[str] = Counter()
    good: Counter[str] = Counter()
    for kinds, (images, ids, labels) in batches:
        with torch.autocast("cpu", torch.bfloat16):
            best = model(input_ids=ids, pixel_values=images).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        at, kind = wanted != -100, iter(kinds)
        for b, w, a in zip(best, wanted, at, strict=True):
            hits, row = (b == w)[a].tolist(), w[a].tolist()
            ends = [i + 1 for i, token in enumerate(row) if token == model.config.text_config.eos_token_id]
            for begin, end in zip([0, *ends], ends, strict=False):
                name = next(kind)
                asked[name] += 1
                good[name] += all(hits[begin:end])
    parts = [f"{name} {good[name] / n:.2f}" for name, n in sorted(asked.items())]
    return f"{sum(good.values()) / sum(asked.values()):.3f} of {sum(asked.values())}: " + ", ".join(parts)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Writes the folder that ships: fp16 safetensors, LlavaProcessor, chat template."""
    half = make_model(processor.tokenizer)
    half.load_state_dict(model.state_dict())
    half.generation_config.max_new_tokens = None
    half.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tower", "model"])
    parser.add_argument("--out", type=Path, default=Path("build/builtin"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # gradients that have all but vanished would take a CPU ages to multiply
    (train_tower if args.stage == "tower" else train_model)(args)


if __name__ == "__main__":
    sys.exit(main())
