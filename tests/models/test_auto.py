"""What `auto` takes on machines of all kinds, what is said about it, and that a run stays with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Run
from helpers.tables import for_each
from PIL import Image

from llava_cli.catalog import sizes_of_alias, sizes_on_disk
from llava_cli.hardware import cpu, memory
from llava_cli.hardware.device import Plan, choose_plan
from llava_cli.models import precision
from llava_cli.models.aliases import ALIASES
from llava_cli.models.families import family_named
from llava_cli.models.footprint import footprint
from llava_cli.models.precision import best_fit, candidates
from llava_cli.models.registry import Checkpoint
from llava_cli.models.weight_files import check_weights

ZEN4, ZEN3, SAPPHIRE_RAPIDS, GRAVITON3, GRAVITON2 = (
    frozenset(names.split())
    for names in (
        "avx2 fma avx512f avx512_vnni avx512_bf16",
        "avx2 fma f16c",
        "avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8",
        "asimd bf16 i8mm",
        "asimd asimddp",
    )
)


@for_each(
    "features, expected",
    [(ZEN4, "bf16"), (SAPPHIRE_RAPIDS, "bf16"), (GRAVITON3, "bf16"), (ZEN3, "fp32"), (GRAVITON2, "fp32"), ((), "fp32")],
)
def test_bf16_is_for_cpus_that_multiply_in_it(
    features: frozenset[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset(features))
    assert choose_plan("cpu", "auto").precision == expected
    for quantized in ("8bit", "4bit"):
        assert Plan("cpu", quantized, "sdpa", "").compute_precision == expected


@for_each(
    "name, machine, features, has_bitsandbytes, gigabytes, expected",
    [
        ("llava-1.5-7b", "cpu", ZEN4, True, 20, "bf16"),
        ("llava-1.5-7b", "cpu", ZEN4, True, 12, "8bit"),
        ("llava-1.5-7b", "cpu", ZEN4, True, 7, "4bit"),
        ("llava-1.5-7b", "cpu", ZEN4, True, 4, None),
        ("llava-1.5-7b", "cpu", ZEN4, False, 20, "bf16"),
        ("llava-1.5-7b", "cpu", ZEN4, False, 12, None),
        ("llava-1.5-7b", "cpu", ZEN3, True, 40, "fp32"),
        ("llava-1.5-7b", "cpu", ZEN3, True, 20, "8bit"),
        ("llava-1.5-7b", "cpu", ZEN3, True, 9, "4bit"),
        ("llava-1.5-7b", "cpu", ZEN3, False, 20, None),
        ("llava-1.5-7b", "cuda", ZEN3, True, 24, "bf16"),
        ("llava-1.5-7b", "cuda", ZEN3, True, 12, "8bit"),
        ("llava-1.5-7b", "cuda", ZEN3, True, 8, "4bit"),
        ("llava-1.6-34b", "cpu", SAPPHIRE_RAPIDS, True, 64, "8bit"),
        ("llava-1.6-34b", "cpu", SAPPHIRE_RAPIDS, True, 32, "4bit"),
        ("smolvlm-256m", "cpu", ZEN3, True, 4, "fp32"),
    ],
)
def test_the_best_precision_that_fits(
    name: str,
    machine: str,
    features: frozenset[str],
    has_bitsandbytes: bool,
    gigabytes: float,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: features)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(precision, "can_quantize", lambda: has_bitsandbytes)
    plan = Plan(machine, "", "sdpa", "")
    fitting = best_fit(sizes_of_alias(name), candidates(plan), int(gigabytes * 1e9))
    assert (fitting.precision if fitting else None) == expected


def test_geometry_of_files_is_that_of_a_model(checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoModelForImageTextToText

    for family in ("llava-llama", "llava-next-mistral", "llava-onevision", "smolvlm"):
        model: Any = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
        text = model.config.get_text_config()
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        linear = [layer for layer in decoder.modules() if type(layer) is torch.nn.Linear and layer is not head]
        weights = check_weights(Checkpoint(family, checkpoint(family)))
        found = weights.geometry
        assert found.inner == sum(layer.weight.numel() for layer in linear), family
        assert found.head == head.weight.numel(), family
        assert found.total == weights.numbers, family
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        assert found.cache == 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim, family
        assert found.patches >= (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2


def test_experts_do_not_count_as_layers_that_are_quantized(tmp_path: Path) -> None:
    """bitsandbytes quantizes linear layers, and a mixture's experts are none: they take 16 bits in every precision."""
    from helpers import families
    from helpers.other_families import OTHERS
    from transformers import AutoModelForImageTextToText

    folder = families.save_made(OTHERS["glm4v-moe"], tmp_path)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    decoder = model.get_decoder()
    linear = sum(layer.weight.numel() for layer in decoder.modules() if type(layer) is torch.nn.Linear)
    routers = sum(weight.numel() for name, weight in decoder.named_parameters() if name.endswith(".gate.weight"))
    found = check_weights(Checkpoint("moe", folder)).geometry
    assert found.inner == linear + routers
    assert found.total == check_weights(Checkpoint("moe", folder)).numbers


def test_facts_of_named_models_agree_with_their_numbers_of_weights() -> None:
    """Less than 5 % is in projectors and norms, which are left out."""
    for name, alias in ALIASES.items():
        assert alias.geometry.total == pytest.approx(alias.parameters * 1e9, rel=0.05), name


def test_a_photo_is_as_many_tokens_as_processors_make_of_it() -> None:
    from helpers import families
    from transformers import Idefics3Processor, LlavaNextProcessor, LlavaOnevisionProcessor, SmolVLMProcessor

    next_grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    onevision_grid = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    words = families.tokenizer()
    next_pixels = families.LlavaNextImageProcessorPil(
        image_grid_pinpoints=next_grid, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    onevision_pixels = families.LlavaOnevisionImageProcessorPil(
        image_grid_pinpoints=onevision_grid, size={"height": 384, "width": 384}
    )
    smol = families._smol()
    processors = {
        "llava-1.6-mistral": LlavaNextProcessor(
            next_pixels,
            words,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        "llava-onevision": families.still(LlavaOnevisionProcessor)(
            image_processor=onevision_pixels,
            tokenizer=families._qwen(),
            num_image_tokens=729,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
        ),
        "smolvlm": Idefics3Processor(
            families.Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
            tokenizer=smol,
            image_seq_len=64,
        ),
        "smolvlm2": families.still(SmolVLMProcessor)(
            families.SmolVLMImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}),
            video_processor=None,
            tokenizer=smol,
            image_seq_len=81,
        ),
    }
    photo = Image.new("RGB", (1024, 768))
    for name, processor in processors.items():
        inputs = processor(images=[photo], text=["<image>"], return_tensors="pt")
        picture = family_named(name).picture
        assert picture is not None
        assert inputs["pixel_values"].shape[1] == picture.crops, name
        assert inputs["input_ids"].shape[1] == pytest.approx(picture.tokens, abs=2), name


def test_a_photo_is_as_many_patches_as_processors_that_keep_its_shape_make_of_it() -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    photo = Image.new("RGB", (1024, 768))
    merging = {  # with the sizes of their checkpoints
        "qwen2-vl": Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}),
        "qwen3-vl": Qwen2VLImageProcessorPil(
            patch_size=16, size={"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
        ),
        "glm-4v": Glm4vImageProcessorPil(),
    }
    for name, pixels in merging.items():
        patches = int(pixels([photo], return_tensors="pt")["image_grid_thw"].prod())
        assert family_named(name).picture == (1, patches // 4, patches), name
    square = {"height": 448, "width": 448}
    tiles = GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, min_patches=1, max_patches=12)
    crops = tiles([photo], return_tensors="pt")["pixel_values"].shape[0]
    assert family_named("internvl3").picture == (crops, 256 * crops, 0)


# ---------------------------------------------------------------- through the command


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint, on a CPU whose best precision is fp32."""
    monkeypatch.setattr(cpu, "cpu_features", lambda: ZEN3)
    return checkpoint("llava-llama")


def leave(monkeypatch: pytest.MonkeyPatch, folder: Path, precision: str, spare: int) -> None:
    """Leaves as much memory as a checkpoint takes in a precision, and `spare` bytes more."""
    sizes = sizes_on_disk(Checkpoint("", folder))
    assert sizes is not None
    free = footprint(sizes, Plan("cpu", precision, "sdpa", "")).total + spare
    monkeypatch.setattr(memory, "free_memory", lambda device: free)


def test_auto_takes_fewer_bits_where_memory_is_short_and_says_so(
    folder: Path, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("ask", "-m", folder, drawing, "what?", "--max-tokens", "1", "--json")
    for bits in ("4", "8"):
        leave(monkeypatch, folder, f"{bits}bit", 0)
        done = run(*ask)
        assert json.loads(done.stdout)["precision"] == f"{bits}bit"
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"llava: {folder}: in {bits} bits (0.6 GB): fp32 takes 0.6 GB and ")
        assert line.endswith("; -p fp32 overrides this")
        assert run(*ask, "-q").stderr == ""
    done = run(*ask, "-p", "fp32")
    assert (json.loads(done.stdout)["precision"], done.stderr) == ("fp32", "")
    leave(monkeypatch, folder, "fp32", 0)
    assert json.loads(run(*ask).stdout)["precision"] == "fp32"
    leave(monkeypatch, folder, "4bit", -1)
    assert json.loads(run(*ask).stdout)["precision"] == "8bit", "its copy is there, and takes less than making one"
    run("models", "prune")
    done = run(*ask)
    assert (done.exit_code, done.stdout) == (71, "")
    assert done.stderr.startswith(f"llava: {folder}: needs 0.6 GB even in 4 bits, ")
    assert f"\n  llava ask -m {folder} -p 4bit tries it; llava models lists" in done.stderr


def test_what_could_be_quantized_is_named_where_nothing_quantizes(
    folder: Path, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, folder, "fp32", -1)
    monkeypatch.setattr(precision, "can_quantize", lambda: False)
    done = run("ask", "-m", folder, drawing, "what?")
    assert done.exit_code == 71
    assert "; 8 and 4 bits take less, and bitsandbytes is missing\n  pip install bitsandbytes\n" in done.stderr


def test_a_batch_goes_on_in_the_precision_that_it_began_with(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    rows = tmp_path / "rows.jsonl"
    batch = ("batch", tmp_path, "what?", "-m", folder, "--max-tokens", "1", "-o", rows)

    def saved() -> Any:
        return json.loads((tmp_path / "rows.jsonl.run/settings.json").read_text())["precision"]

    leave(monkeypatch, folder, "4bit", 0)
    assert "in 4 bits" in run(*batch).stderr
    assert saved() == "4bit"
    leave(monkeypatch, folder, "fp32", 0)
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "b.png")
    done = run(*batch, "--extend")
    assert (done.exit_code, saved(), len(rows.read_text().splitlines())) == (0, "4bit", 2)
    assert run(*batch, "-p", "fp32").exit_code == 65

    rows.unlink()
    (tmp_path / "rows.jsonl.run/settings.json").unlink()
    assert run(*batch).exit_code == 0
    assert saved() == "fp32"
    leave(monkeypatch, folder, "8bit", 0)
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    done = run(*batch, "--extend")
    assert (done.exit_code, saved()) == (0, "fp32"), done.stderr


@for_each("how", ["option", "variable", "file"])
def test_a_precision_that_is_asked_for_is_taken_without_a_line(
    how: str, folder: Path, run: Run, drawing: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, folder, "4bit", 0)
    if how == "variable":
        monkeypatch.setenv("LLAVA_PRECISION", "8bit")
    elif how == "file":
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text("precision = '8bit'\n")
    option = ["-p", "8bit"] if how == "option" else []
    done = run("ask", "-m", folder, drawing, "what?", "--max-tokens", "1", "--json", *option)
    assert (json.loads(done.stdout)["precision"], done.stderr) == ("8bit", "")
    assert "overrides this" in run("ask", "-m", folder, drawing, "what?", "--max-tokens", "1", "-p", "auto").stderr


def test_what_is_stored_quantized_has_one_precision(
    folder: Path, run: Run, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a batch notes, too; and where even that does not fit, the line names no other."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    stored, skipped = tmp_path / "stored", ["lm_head", "vision_tower", "multi_modal_projector"]
    shutil.copytree(folder, stored, ignore=shutil.ignore_patterns("*.safetensors"))
    options: Any = {"load_in_8bit": True, "llm_int8_skip_modules": skipped}
    made = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))
    made.save_pretrained(stored)
    rows = tmp_path / "rows.jsonl"
    leave(monkeypatch, stored, "8bit", 0)
    done = run("batch", drawing, "what?", "-m", stored, "--max-tokens", "1", "-o", rows)
    assert (done.exit_code, "in 8 bits" in done.stderr) == (0, False), done.stderr
    assert json.loads((tmp_path / "rows.jsonl.run/settings.json").read_text())["precision"] == "8bit"
    leave(monkeypatch, stored, "8bit", -1)
    done = run("ask", "-m", stored, drawing, "what?")
    assert done.exit_code == 71
    assert done.stderr.startswith(f"llava: {stored}: needs 0.6 GB, 0.6 GB are free\n  llava ask -m ")
