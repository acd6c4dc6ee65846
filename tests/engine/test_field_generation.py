"""Tokens are those of transformers' `generate` with all that a checkpoint asks for, or it is refused by name.

kind                           | example                  | own variants                              | right value                       | test
-------------------------------|--------------------------|-------------------------------------------|-----------------------------------|-----
what changes greedy tokens     | no_repeat_ngram_size     | penalties, biases, lengths, suppressed    | tokens of `generate`, alone and   | test_greedy_settings
                               |                          | tokens, stop strings                      | in a batch                        |
what changes sampled tokens    | top_k                    | top_p, min_p, typical_p, cutoffs          | the same, with a seed             | test_sampled_settings
whose top-p it is              | the checkpoint's         | the user's; on the server                 | the user's where it is set        | test_the_users_top_p_goes_first, test_server
settings in config.json        | repetition_penalty       | in text_config; both                      | as `generate` takes them          | test_settings_in_config_json
settings are not saved         | temperature, no sampling | in 4 and in 8 bits                        | a copy is made, settings hold     | test_quantized_copies
what is not done               | num_beams                | contrastive, guidance, watermark, …       | 69, one line, the way round       | test_refused
what is no setting             | a text for a number      | ids that do not exist, no list            | 69, one line                      | test_damaged
an end that only others know   | the tokenizer's          | the template's, config.json's             | the answer ends there             | test_end_tokens
a config's default end         | 2 for Llama              | none at all                               | a word is no end                  | test_a_word_is_no_end, test_no_end
decoders of other kinds        | Gemma 2 (soft caps)      | sinks, windows, experts, rotary parts, …  | tokens of `generate`, also in a   | test_decoders
                               |                          |                                           | batch and in a chat               |
stored in 4 or 8 bits          | nf4                      | fp4, double, storage dtypes, skipped      | answers, no noise, doctor is right| test_stored_quantized
doctor names                   | settings and end tokens  | the picture's token                       | lines of its own                  | test_doctor
tiny temperatures              | 1e-6                     | 1e-45; in a batch, on the server          | the greedy answer                 | test_tiny_temperature, test_server
numbers out of range           | top_p 0                  | seeds of more than 64 bits, temperature 11| 2, one line                       | test_out_of_range
"""  # noqa: E501

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import families
from helpers.command import Run
from helpers.engines import ours, picture
from helpers.servers import Serve
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from llava_cli import Answer, Conversation, Sampling, load
from llava_cli.engine import Request
from llava_cli.engine.generate.generation_config import REFUSED
from llava_cli.engine.local import LocalEngine

MOST = 16
TALKS = [
    Conversation().ask("what is this?", [picture(60, 60, 1)]),
    Conversation().ask("what color is the thing on the left?", [picture(60, 60, 2)]),
    Conversation().ask("no picture?"),
]
END = 258
"""`</s>` of `families.tokenizer`."""
FIRST = [203, 108, 216]
"""What "llava-llama" says first, unless it may not."""


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    shutil.copytree(checkpoint("llava-llama"), tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values: Any) -> None:
    """Sets keys of a JSON object, in place or of a file that is not there; None deletes one."""
    content = {**(json.loads(file.read_text()) if file.exists() else {}), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def generation(folder: Path, **values: Any) -> None:
    change(folder / "generation_config.json", **values)


class Reference:
    """transformers alone, on a folder."""

    def __init__(self, folder: Path) -> None:
        self.processor = families.processor_of("llava-llama", folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)

    def tokens(self, engine: LocalEngine, talk: Conversation, **options: Any) -> list[int]:
        fit = engine.prompter.image_processor.fit
        images = [[fit(shown.image) for shown in talk.pictures]] if talk.pictures else None
        inputs = self.processor(text=[engine.prompter.render(talk)], images=images, return_tensors="pt")
        options = {"max_new_tokens": MOST, "do_sample": False, "tokenizer": self.processor.tokenizer, **options}
        found: list[int] = self.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
        return found

    def text(self, tokens: list[int]) -> str:
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def in_fp32(folder: Path) -> LocalEngine:
    return load(str(folder), precision="fp32", device="cpu")


def same(folder: Path, sampling: Sampling, **options: Any) -> list[list[int]]:
    """The tokens of `generate`, which are ours, one by one, streamed and in a batch."""
    engine, by = in_fp32(folder), Reference(folder)
    found = dict(engine.answer_many([Request(talk, sampling) for talk in TALKS], size=3))
    every = []
    for number, talk in enumerate(TALKS):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        every.append(expected := by.tokens(engine, talk, **options))
        assert ours(engine, talk, sampling, MOST) == expected
        assert engine.answer(talk, sampling).text == by.text(expected)
        batched = found[number]
        assert isinstance(batched, Answer) and batched.text == by.text(expected)
    return every


GREEDY: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.5, "do_sample": True, "temperature": 0.2, "top_p": 0.5, "max_length": 20},
    {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [FIRST[:1], FIRST[1:]]},
    {"sequence_bias": [[FIRST[:1], -50.0]]},
    {"eos_token_id": END, "sequence_bias": [[[END], 90.0]], "min_new_tokens": 5},
    {"eos_token_id": [END, 2], "sequence_bias": [[[END], 90.0]], "min_length": 30},
    {"suppress_tokens": FIRST},
    {"begin_suppress_tokens": FIRST[:1]},
    {"forced_eos_token_id": END, "forced_bos_token_id": 1},
    {"exponential_decay_length_penalty": [3, 1.9]},
    {"remove_invalid_values": True, "renormalize_logits": True},
]


@pytest.mark.parametrize("settings", GREEDY, ids=lambda settings: next(iter(settings)))
def test_greedy_settings(settings: dict[str, Any], folder: Path) -> None:
    generation(folder, **settings)
    same(folder, Sampling(max_tokens=MOST))


def test_greedy_settings_change_the_answer(folder: Path) -> None:
    plain = in_fp32(folder).answer(TALKS[0], Sampling(max_tokens=MOST)).text
    generation(folder, suppress_tokens=FIRST)
    assert same(folder, Sampling(max_tokens=MOST))[0][0] not in FIRST
    assert in_fp32(folder).answer(TALKS[0], Sampling(max_tokens=MOST)).text != plain


def test_stop_strings_end_as_the_users_do(folder: Path) -> None:
    whole = in_fp32(folder).answer(TALKS[0], Sampling(max_tokens=MOST)).text
    stop = next(whole[at : at + 2] for at in range(2, len(whole)) if whole[at : at + 2].isascii())
    generation(folder, stop_strings=stop)
    answer = in_fp32(folder).answer(TALKS[0], Sampling(max_tokens=MOST))
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)].rstrip(), "stop")


SAMPLED: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_p": 0.5},
    {"min_p": 0.1, "typical_p": 0.5},
    {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
    {"do_sample": False, "temperature": 0.2, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("settings", SAMPLED, ids=lambda settings: next(iter(settings)))
def test_sampled_settings(settings: dict[str, Any], folder: Path) -> None:
    generation(folder, **settings)
    sampling = Sampling(max_tokens=MOST, temperature=0.8, seed=3, unset=frozenset({"top_p"}))
    own = {"do_sample": True, "temperature": 0.8, "top_k": settings.get("top_k", 0)}
    same(folder, sampling, **own)


def test_the_users_top_p_goes_first(folder: Path) -> None:
    generation(folder, top_p=0.1)
    sampling = Sampling(max_tokens=MOST, temperature=0.8, seed=3, top_p=0.9)
    same(folder, sampling, do_sample=True, temperature=0.8, top_k=0, top_p=0.9)


@pytest.mark.parametrize("place", ["config.json", "text_config", "both"])
def test_settings_in_config_json(place: str, folder: Path) -> None:
    """As transformers wrote them once; where both parts have one, the outer one holds."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if place != "config.json":
        config["text_config"]["repetition_penalty"] = 1.2 if place == "both" else 1.6
    if place != "text_config":
        config["repetition_penalty"] = 1.6
    path.write_text(json.dumps(config))
    assert in_fp32(folder).network.generation_config.repetition_penalty == 1.6
    same(folder, Sampling(max_tokens=MOST))


@pytest.mark.parametrize("precision", ["4bit", "8bit"])
def test_quantized_copies(precision: Any, folder: Path) -> None:
    """transformers saves no settings that contradict each other; a copy needs none."""
    generation(folder, temperature=0.2, top_p=0.5, suppress_tokens=FIRST)
    for _ in range(2):  # with a new copy, and from it
        engine = load(str(folder), precision=precision, device="cpu")
        assert engine.network.generation_config.suppress_tokens == FIRST
        assert not set(FIRST) & set(ours(engine, TALKS[0], Sampling(), MOST))


ASKING = {
    "num_beams": 4,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "guidance_scale": 1.5,
    "constraints": [1],
    "force_words_ids": [[5]],
    "watermarking_config": {"bias": 2.5},
    "token_healing": True,
    "is_assistant": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, run: Run, folder: Path, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_cli.models.weights.load_model", lambda *args: pytest.fail("weights were read"))
    generation(folder, **{name: ASKING[name]})
    result = run("ask", "-m", folder, drawing, "what is this?")
    assert (result.exit_code, result.stdout) == (69, "")
    first, hint = result.stderr.splitlines()
    assert first == f"llava: {folder}: generation_config.json asks for {REFUSED[name][0]} ({name}), which is not done"
    assert hint.strip() == f"delete {name} from generation_config.json to have the likeliest token each time"


@pytest.mark.parametrize("values", [{"num_beams": 1}, {"guidance_scale": 1.0, "penalty_alpha": 0}])
def test_not_asked_for(values: dict[str, Any], run: Run, folder: Path, drawing: Path) -> None:
    generation(folder, **values, num_return_sequences=1, prompt_lookup_num_tokens=3, length_penalty=2.0, unknown=1)
    assert run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "2").exit_code == 0


DAMAGED: list[dict[str, Any]] = [
    {"eos_token_id": "</s>"},
    {"stop_strings": [1]},
    {"no_repeat_ngram_size": "two"},
    {"repetition_penalty": -1.0},
    {"suppress_tokens": [10**6], "bad_words_ids": "x"},
    {"sequence_bias": [[[10**6], 1.0]]},
    {"top_p": 3.0, "typical_p": -1},
    {"num_beams": {}},
]


@pytest.mark.parametrize("values", DAMAGED, ids=lambda values: next(iter(values)))
def test_damaged(
    values: dict[str, Any], run: Run, folder: Path, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_cli.models.weights.load_model", lambda *args: pytest.fail("weights were read"))
    generation(folder, **values)
    result = run("ask", "-m", folder, drawing, "what is this?")
    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr.startswith(f"llava: {folder}: ") and "generation" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 2


def test_end_tokens(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Each of three files knows one that the others do not, and the template one that none of them does."""
    shutil.copytree(checkpoint("llava-next-qwen"), folder := tmp_path / "model")
    vocabulary = in_fp32(folder).prompter.tokenizer.get_added_vocab()
    turn, text, start = (vocabulary[word] for word in ("<|im_end|>", "<|endoftext|>", "<|im_start|>"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = start
    change(folder / "config.json", text_config=config["text_config"])
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    generation(folder, eos_token_id=7, sequence_bias=[[[turn], 90.0]])
    engine = in_fp32(folder)
    assert engine.end_tokens == {7, turn, text, start}
    for outcome in (engine.answer(TALKS[0]), dict(engine.answer_many([Request(TALKS[0], Sampling())]))[0]):
        assert isinstance(outcome, Answer)
        assert (outcome.text, outcome.finish_reason, outcome.answer_tokens) == ("", "stop", 1)


def test_the_tokenizers_end(run: Run, folder: Path, drawing: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].pop("eos_token_id", None)
    change(folder / "config.json", text_config=config["text_config"])
    generation(folder, eos_token_id=7, sequence_bias=[[[END], 90.0]], min_new_tokens=3)
    result = run("ask", "-m", folder, drawing, "what is this?", "--json", "-p", "fp32")
    found = json.loads(result.stdout)
    assert (found["finish_reason"], found["answer_tokens"]) == ("stop", 4)


def test_a_word_is_no_end(folder: Path) -> None:
    """transformers has 2 for Llama where a config says nothing, which here is "#" or another word."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].pop("eos_token_id", None)
    change(folder / "config.json", text_config=config["text_config"])
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert in_fp32(folder).end_tokens == {END}


def test_no_end(folder: Path) -> None:
    generation(folder, eos_token_id=[], sequence_bias=[[[END], 90.0]])
    assert in_fp32(folder).answer(TALKS[0], Sampling(max_tokens=5)).finish_reason == "length"


DECODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "yarn": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    ),
    "biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 16}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma": (transformers.GemmaConfig, {}),
    "gemma2": (transformers.Gemma2Config, {"sliding_window": 16, "query_pre_attn_scalar": 64}),
    "gemma3": (transformers.Gemma3TextConfig, {"sliding_window": 16}),
    "gpt-oss": (transformers.GptOssConfig, {"num_local_experts": 4, "sliding_window": 16}),
    "phi": (transformers.PhiConfig, {"partial_rotary_factor": 0.5}),
    "phi3": (transformers.Phi3Config, {}),
    "olmo2": (transformers.Olmo2Config, {}),
    "granite": (transformers.GraniteConfig, {"attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "cohere": (transformers.CohereConfig, {}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "gpt-neox": (transformers.GPTNeoXConfig, {}),
    "bloom": (transformers.BloomConfig, {}),  # ALiBi
    "gpt2": (transformers.GPT2Config, {}),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = DECODERS[name]
    made = partial(families._llava, partial(kind, **options), families.VICUNA)
    monkeypatch.setitem(families.FAMILIES, name, made)
    folder = families.save(name, tmp_path / name)
    same(folder, Sampling(max_tokens=MOST))
    engine, by, talk = in_fp32(folder), Reference(folder), TALKS[0]
    for question, pictures in (("why?", []), ("and this one?", [picture(80, 50, 9)])):
        talk = talk.answered(engine.answer(talk, Sampling(max_tokens=MOST)).text).ask(question, pictures)
        answer = engine.answer(talk, Sampling(max_tokens=MOST))
        assert answer.text == by.text(by.tokens(engine, talk)) and answer.cached_tokens


STORED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double, fp16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "stored as bf16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "stored as fp32": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.float32},
    "4 bits, some skipped": {"load_in_4bit": True, "llm_int8_skip_modules": ["vision_tower", "lm_head", "mlp"]},
    "8 bits": {"load_in_8bit": True},
    "8 bits, some skipped": {"load_in_8bit": True, "llm_int8_skip_modules": ["vision_tower", "lm_head"]},
}


@pytest.mark.parametrize("name", STORED)
def test_stored_quantized(
    name: str,
    run: Run,
    checkpoint: Callable[[str], Path],
    drawing: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plain, folder = checkpoint("llava-llama"), tmp_path / "model"
    options = BitsAndBytesConfig(**STORED[name])
    model = AutoModelForImageTextToText.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=options, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    families.processor_of("llava-llama", plain).save_pretrained(folder)
    capfd.readouterr()
    result = run("ask", "-m", folder, drawing, "what is this?", "--max-tokens", "4", "--device", "cpu")
    assert (result.exit_code, result.stderr) == (0, "") and result.stdout.strip()
    assert capfd.readouterr().err == ""
    checks = json.loads(run("doctor", folder, "--json", "--device", "cpu").stdout)
    assert [check for check in checks if not check["good"]] == []
    precision = "8bit" if "load_in_8bit" in STORED[name] else "4bit"
    (words,) = [check["words"] for check in checks if check["check"] == "precision"]
    assert words.endswith(f"layers are stored in {precision}")


def test_doctor(run: Run, folder: Path) -> None:
    generation(folder, no_repeat_ngram_size=2, do_sample=True, temperature=0.2, top_k=20, eos_token_id=7)
    checks = json.loads(run("doctor", folder, "--json", "-p", "fp32").stdout)
    words = {check["check"]: check["words"] for check in checks}
    assert words["generation"] == (
        "no_repeat_ngram_size 2: applied; top_k 20: applied where --temperature samples; "
        "do_sample True, temperature 0.2: left to --temperature and --max-tokens"
    )
    assert words["end tokens"].endswith(f", {END} </s>")
    assert words["image tokens"].endswith("; '<image>' is token 259")


@pytest.mark.parametrize("temperature", [1e-6, 1e-45, 5e-324, 1e-5])
def test_tiny_temperature(temperature: float, folder: Path) -> None:
    same(folder, Sampling(max_tokens=MOST, temperature=temperature, top_p=0.5, seed=1), do_sample=False)


def test_server(serve: Serve, folder: Path) -> None:
    generation(folder, suppress_tokens=FIRST, top_p=0.01)
    server = serve("-m", folder, "-p", "fp32", "--max-tokens", "8")
    client = server.client()

    def said(**options: Any) -> str:
        messages: Any = [{"role": "user", "content": "no picture?"}]
        found = client.chat.completions.create(model="", messages=messages, **options)
        return str(found.choices[0].message.content)

    greedy = said()
    assert greedy == in_fp32(folder).answer(TALKS[2], Sampling(max_tokens=8)).text
    for temperature in (0, 1e-6, 1e-45, 5e-324):
        assert said(temperature=temperature) == greedy
    assert said(temperature=2.0, seed=1) == greedy  # of the checkpoint's top-p nothing but the likeliest is left
    assert said(temperature=2.0, seed=1, top_p=1.0) != greedy


@pytest.mark.parametrize(
    "option, value",
    [
        ("--top-p", "0"),
        ("--top-p", "nan"),
        ("--temperature", "11"),
        ("--temperature", "-1e-9"),
        ("--seed", str(2**64)),
        ("--seed", str(-(2**63) - 1)),
        ("--seed", "9" * 5000),
    ],
)
def test_out_of_range(option: str, value: str, run: Run, drawing: Path) -> None:
    result = run("ask", drawing, "what is this?", option, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr and option in result.stderr


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
def test_seeds_of_64_bits(seed: int, folder: Path) -> None:
    engine = in_fp32(folder)
    sampling = Sampling(max_tokens=4, temperature=10, top_p=0.0001, seed=seed)
    assert engine.answer(TALKS[2], sampling).text == engine.answer(TALKS[2], sampling).text
