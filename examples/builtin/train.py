"""Trains the model that ships inside the package: a LLaVA of 6 M parameters that knows drawings.

    python examples/builtin/train.py tower     # 7 minutes on 2 cores: vision tower, projector, words
    python examples/builtin/train.py model     # 80 minutes: all of it

The first command teaches the tower to say what is on each patch of crowded scenes; without it the
whole model takes several times as long to find out what a shape is. The second trains the decoder to
answer, and goes on with tower and projector at a tenth of its pace while still asking them what is on each
patch, lest they forget. Answers end in `</s>`, as in LLaVA-1.5 (arXiv 2310.03744). Both are seeded and keep a
checkpoint in `--out`, from which the second goes on where it was stopped; it leaves a folder there that
`llava ask -m FOLDER` loads. torch.compile needs a C++ compiler.

Needs: `pip install -c constraints.txt '.[train]'` (easy-vqa, scikit-image).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import samples
import torch
from batches import WIDTH, WORDS, Batch, ModelBatch, PatchBatch, Row, easy_vqa, pack, stream
from model import PATCH, make_model, make_processor, make_tokenizer, pixels
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast


def schedule(done: float) -> float:
    """Learning rate as a share of its peak: a short rise, then a cosine down to nothing.

    Past its end the cosine begins again at three tenths (a warm restart, arXiv 1608.03983).
    """
    if done >= 1:
        return 0.15 * (1 + math.cos(math.pi * (done - 1) / POLISH))
    return min(1.0, done / 0.02) * 0.5 * (1 + math.cos(math.pi * done))


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

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images [n, 3, 64, 64] -> what the tower makes of each patch [n, 64, 192], and the projector [n, 64, 256]."""
        features = self.tower(images, output_hidden_states=True).hidden_states[-1][:, 1:]
        return features, self.projector(features)

    def forward(
        self,
        features: torch.Tensor,
        projected: torch.Tensor,
        labels: torch.Tensor,
        places: torch.Tensor,
        masks: torch.Tensor,
    ) -> tuple[torch.Tensor, list[float]]:
        """What `see` returns and what `patch_answers` does -> loss, share right for each of `WORDS`."""
        on, known = labels[:, 0] >= 0, masks[:, 0, 0] >= 0
        loss = nn.functional.smooth_l1_loss(self.place(features).float()[on], places[on])
        loss = loss + nn.functional.binary_cross_entropy_with_logits(self.mask(features).float()[known], masks[known])
        read = nn.functional.rms_norm(projected.float(), projected.shape[-1:])  # as the decoder reads its own states
        right = []
        for words, wanted in zip(self.words, labels.unbind(1), strict=True):
            scores = nn.functional.linear(read, self.embeddings.weight[words])
            loss = loss + nn.functional.cross_entropy(scores.transpose(1, 2), wanted)
            asked = wanted >= 0
            right.append((scores.argmax(2)[asked] == wanted[asked]).float().mean().item())
        return loss, right


FROZEN = 500  # steps of stage two in which tower and projector stay as they are
POLISH = 4 / 11  # how much longer it goes on after its steps, at a low learning rate


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
        images, *answers = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = patches(*patches.see(images), *answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(patches.parameters(), 1.0)
        optimizer.step()
        seen.append([loss.item(), *right])
        if step % 50 == 49 or step + 1 == steps:
            mean = " ".join(f"{m:.3f}" for m in np.mean(seen[-50:], 0))
            took = time.monotonic() - start
            print(f"{step + 1} {took:.0f}s loss; shape, colour, row, column, background right: {mean}", flush=True)
            torch.save(patches.state_dict(), args.out / "tower.pt")


def train_model(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    patches = Patches(model, processor.tokenizer)
    patches.load_state_dict(torch.load(args.out / "tower.pt", weights_only=True), strict=False)
    size, steps, rate = args.batch or 16, args.steps or 11000, args.rate or 7e-4
    eyes = [*patches.tower.parameters(), *patches.projector.parameters()]
    rest = [*model.model.language_model.parameters(), *patches.place.parameters(), *patches.mask.parameters()]
    groups = [{"params": rest, "share": 1.0}, {"params": eyes, "share": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    first, resume = 0, args.out / "model.pt"
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    batches = stream(ModelBatch(size, easy_vqa("train"), steps), args.seed + 1, first)
    held_out = held_out_batches(size)
    if not first:
        look_up_first(model, patches, held_out[0][1][0])
    reader = Reader(model, patches)
    start, seen = time.monotonic(), []
    end = steps + round(steps * POLISH)
    for step in range(first, end):
        images, rows, *answers = next(batches)
        # A decoder that cannot read yet would only unteach the eyes what stage one taught them.
        for parameter in eyes:
            parameter.requires_grad_(step >= FROZEN)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"] * schedule(step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits, features, projected = reader(images, rows)
            seeing, shares = patches(features, projected, *answers)
        speaking = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[1, :, 1:].flatten())
        optimizer.zero_grad()
        (speaking + 0.1 * seeing).backward()
        nn.utils.clip_grad_norm_(patches.parameters(), 1.0)
        nn.utils.clip_grad_norm_(model.model.language_model.parameters(), 1.0)
        optimizer.step()
        seen.append([speaking.item(), *shares])
        if step % 100 == 99:
            mean = " ".join(f"{m:.3f}" for m in np.nanmean(seen[-100:], 0))
            print(f"{step + 1} {time.monotonic() - start:.0f}s loss; patches as in stage one: {mean}", flush=True)
        if step % 500 == 499 or step + 1 in (steps, end):
            print(f"{step + 1} {right(reader, held_out)}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, resume.with_suffix(".new"))
            resume.with_suffix(".new").replace(resume)
            save(model, processor, args.out / "checkpoint")


@torch.no_grad()
def look_up_first(model: LlavaForConditionalGeneration, patches: Patches, images: torch.Tensor) -> None:
    """Lets the decoder begin by attending to what is like the word it reads, and by copying it.

    Keys start as queries, and each output projection as the transpose of its values' (a form of mimetic
    initialisation, arXiv 2305.09828): "circle" in a question finds the patches that say circle. Without,
    it takes thousands of steps to find out that a picture can be looked things up in. Patches are
    brought to unit size besides, or the decoder's layers could add nothing to them.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    size, last = patches.see(images)[1].std(), model.model.multi_modal_projector.linear_2
    last.weight.div_(size)
    last.bias.div_(size)


class Reader(nn.Module):
    """The whole model over packed rows."""

    def __init__(self, model: LlavaForConditionalGeneration, patches: Patches) -> None:
        super().__init__()
        self.patches, self.lm_head, self.image = patches, model.lm_head, model.config.image_token_id
        self.decoder = model.model.language_model
        self.decoder.compile(dynamic=False)

    def forward(self, images: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images [n, 3, 64, 64], rows as `pack` makes them -> logits [rows, width, words] and what `Patches` reads."""
        ids, _, parts, positions = rows
        features, projected = self.patches.see(images)
        words = self.patches.embeddings(ids)
        inputs = words.masked_scatter((ids == self.image)[..., None], projected.to(words.dtype))
        seen = (parts[:, None] == parts[..., None]) | (parts[:, None] == 0)
        hidden = torch.zeros(seen.shape).masked_fill(~seen.tril(), torch.finfo(torch.float32).min)
        states = self.decoder(
            inputs_embeds=inputs, attention_mask=hidden[:, None], position_ids=positions, use_cache=False
        )
        return self.lm_head(states.last_hidden_state), features, projected


def held_out_batches(size: int) -> list[tuple[list[str], Batch]]:
    """Fresh scenes with questions that stand alone, and the kind of each, for a look at progress.

    In the last eight batches they are about a second picture, after two turns about a first.
    """
    made, batch = [], ModelBatch(size, [], 1)
    for number in range(24):
        pictures = 1 if number < 16 else 2
        rng, images, rows, kinds = Random(f"held out/{number}"), [], [], []
        for i in range(size // pictures):
            row = Row(batch.tokenizer)
            if pictures == 2:
                before = samples.drawing(rng, 2)
                row.add(before.turns)
                images.append(before.image)
            sample = samples.no_drawing(batch.photos, 2, rng) if i == 0 else samples.drawing(rng, 6)
            row.add(sample.turns, apart=True)
            images.append(sample.image)
            kinds += [kind if pictures == 1 else f"second {kind}" for kind, _, _ in sample.turns]
            rows.append(row)
        made.append((kinds, (pixels(images, batch.processor), pack(rows, WIDTH * pictures))))
    return made


@torch.no_grad()
def right(reader: Reader, batches: list[tuple[list[str], Batch]]) -> str:
    """Share of answers that greedy decoding would get right to the letter, by kind of question."""
    asked: Counter[str] = Counter()
    good: Counter[str] = Counter()
    for kinds, (images, rows) in batches:
        with torch.autocast("cpu", torch.bfloat16):
            best = reader(images, rows)[0][:, :-1].argmax(-1)
        wanted, parts, kind = rows[1, :, 1:], rows[2, :, 1:], iter(kinds)
        for hits, row, part in zip(best == wanted, wanted, parts, strict=True):
            for number in range(1, int(part.max()) + 1):
                name, at = next(kind), (part == number) & (row != -100)
                asked[name] += 1
                good[name] += bool(hits[at].all())
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
