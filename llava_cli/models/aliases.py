"""Short names of models on the Hub. Data; nothing here loads a model."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from llava_cli.models.geometry import Decoder, Geometry, VisionTower, geometry_of


@dataclass(frozen=True)
class Alias:
    """A model with a short name."""

    repo: str
    parameters: float
    """In billions, vision tower included."""
    family: str
    """Its name in `families`."""
    language_model: str
    """The language model that it was made from."""
    note: str = ""
    _: KW_ONLY
    parts: tuple[Decoder, VisionTower]
    """The sizes of language model and vision tower, from their configs."""
    bits: int = 16
    """Of a weight in its repo."""

    @property
    def bytes(self) -> int:
        """The size of its download."""
        return round(self.parameters * 1e9 * self.bits / 8)

    @property
    def geometry(self) -> Geometry:
        return geometry_of(*self.parts)


_CLIP_L = VisionTower(1024, 24, 4096, 577)
_SIGLIP_SO400M = VisionTower(1152, 26, 4304, 729)
"""Without its last layer."""
_VICUNA_7B = Decoder(4096, 32, 11008, 4096, 4096, 32064), _CLIP_L
_VICUNA_13B = Decoder(5120, 40, 13824, 5120, 5120, 32064), _CLIP_L
_MISTRAL_7B = Decoder(4096, 32, 14336, 4096, 1024, 32064), _CLIP_L
_YI_34B = Decoder(7168, 60, 20480, 7168, 1024, 64064), _CLIP_L
_LLAMA3_8B = Decoder(4096, 32, 14336, 4096, 1024, 128320), _CLIP_L
_QWEN15_72B = Decoder(8192, 80, 24576, 8192, 8192, 152064), _CLIP_L
_QWEN15_110B = Decoder(8192, 80, 49152, 8192, 1024, 152064), _CLIP_L
_QWEN15_05B = Decoder(1024, 24, 2816, 1024, 1024, 152000, is_tied=True), _SIGLIP_SO400M
_QWEN15_7B = Decoder(4096, 32, 11008, 4096, 4096, 152064), _SIGLIP_SO400M
_QWEN2_05B = Decoder(896, 24, 4864, 896, 128, 152000, is_tied=True), _SIGLIP_SO400M
_QWEN2_7B = Decoder(3584, 28, 18944, 3584, 512, 152128), _SIGLIP_SO400M
_QWEN2_72B = Decoder(8192, 80, 29568, 8192, 1024, 152064), _SIGLIP_SO400M
_SMOLLM2_135M = Decoder(576, 30, 1536, 576, 192, 49280), VisionTower(768, 12, 3072, 1024)
_SMOLLM2_360M = Decoder(960, 32, 2560, 960, 320, 49280), VisionTower(768, 12, 3072, 1024)
_SMOLLM2_17B = Decoder(2048, 24, 8192, 2048, 2048, 49280), VisionTower(1152, 27, 4304, 729)


def _merger(patches: int, width: int, hidden_size: int) -> int:
    """Weights of a merger as Qwen-VL's: two layers, from `patches` side by side to the language model."""
    return (patches * width) ** 2 + patches * width * hidden_size


def _qwen2_tower(hidden_size: int) -> VisionTower:
    return VisionTower(1280, 32, 5120, 3996, _merger(4, 1280, hidden_size))


def _qwen25_tower(hidden_size: int) -> VisionTower:
    return VisionTower(1280, 32, 3420, 3996, _merger(4, 1280, hidden_size), is_gated=True)


def _qwen3_tower(hidden_size: int) -> VisionTower:
    """With a merger for each of the three layers whose outputs the language model gets besides the last one's."""
    return VisionTower(1024, 24, 4096, 3072, 4 * _merger(4, 1024, hidden_size))


_QWEN2_VL_2B = Decoder(1536, 28, 8960, 1536, 256, 151936, is_tied=True), _qwen2_tower(1536)
_QWEN2_VL_7B = Decoder(3584, 28, 18944, 3584, 512, 152064), _qwen2_tower(3584)
_QWEN25_VL_3B = Decoder(2048, 36, 11008, 2048, 256, 151936, is_tied=True), _qwen25_tower(2048)
_QWEN25_VL_7B = Decoder(3584, 28, 18944, 3584, 512, 152064), _qwen25_tower(3584)
_QWEN3_VL_2B = Decoder(2048, 28, 6144, 2048, 1024, 151936, is_tied=True), _qwen3_tower(2048)
_QWEN3_VL_4B = Decoder(2560, 36, 9728, 4096, 1024, 151936, is_tied=True), _qwen3_tower(2560)
_QWEN3_VL_8B = (
    Decoder(4096, 36, 12288, 4096, 1024, 151936),
    VisionTower(1152, 27, 4304, 3072, 4 * _merger(4, 1152, 4096)),
)
_SIGLIP_896 = VisionTower(1152, 27, 4304, 4096)
_GEMMA3_4B = Decoder(2560, 34, 10240, 2048, 1024, 262208, is_tied=True), _SIGLIP_896
_GEMMA3_12B = Decoder(3840, 48, 15360, 4096, 2048, 262208, is_tied=True), _SIGLIP_896
_GEMMA3_27B = Decoder(5376, 62, 21504, 4096, 2048, 262208, is_tied=True), _SIGLIP_896
_INTERNVIT = VisionTower(1024, 24, 4096, 1025)
_INTERNVL3_1B = Decoder(896, 24, 4864, 896, 128, 151674), _INTERNVIT
_INTERNVL3_2B = Decoder(1536, 28, 8960, 1536, 256, 151674), _INTERNVIT
_INTERNVL3_8B = Decoder(3584, 28, 18944, 3584, 512, 151674), _INTERNVIT

ALIASES: dict[str, Alias] = {
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf", 7.06, "llava-1.5", "Vicuna 1.5", "the classic", parts=_VICUNA_7B),
    "llava-1.5-13b": Alias("llava-hf/llava-1.5-13b-hf", 13.35, "llava-1.5", "Vicuna 1.5", parts=_VICUNA_13B),
    "llava-1.6-mistral-7b": Alias(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        7.57,
        "llava-1.6-mistral",
        "Mistral 0.2",
        "tiles: small text, wide pictures",
        parts=_MISTRAL_7B,
    ),
    "llava-1.6-vicuna-7b": Alias(
        "llava-hf/llava-v1.6-vicuna-7b-hf", 7.06, "llava-1.6-vicuna", "Vicuna 1.5", parts=_VICUNA_7B
    ),
    "llava-1.6-vicuna-13b": Alias(
        "llava-hf/llava-v1.6-vicuna-13b-hf", 13.35, "llava-1.6-vicuna", "Vicuna 1.5", parts=_VICUNA_13B
    ),
    "llava-1.6-34b": Alias("llava-hf/llava-v1.6-34b-hf", 34.75, "llava-1.6-34b", "Nous Hermes 2 Yi", parts=_YI_34B),
    "llava-next-llama3-8b": Alias(
        "llava-hf/llama3-llava-next-8b-hf", 8.36, "llava-next-llama3", "Llama 3", parts=_LLAMA3_8B
    ),
    "llava-next-72b": Alias("llava-hf/llava-next-72b-hf", 72.67, "llava-next-qwen", "Qwen 1.5", parts=_QWEN15_72B),
    "llava-next-110b": Alias("llava-hf/llava-next-110b-hf", 111.6, "llava-next-qwen", "Qwen 1.5", parts=_QWEN15_110B),
    "llava-onevision-0.5b": Alias(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        0.89,
        "llava-onevision",
        "Qwen 2",
        "small, several pictures",
        parts=_QWEN2_05B,
    ),
    "llava-onevision-7b": Alias(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        8.03,
        "llava-onevision",
        "Qwen 2",
        "several pictures",
        parts=_QWEN2_7B,
    ),
    "llava-onevision-72b": Alias(
        "llava-hf/llava-onevision-qwen2-72b-ov-hf", 73.2, "llava-onevision", "Qwen 2", parts=_QWEN2_72B
    ),
    "llava-interleave-0.5b": Alias(
        "llava-hf/llava-interleave-qwen-0.5b-hf",
        0.86,
        "llava-interleave",
        "Qwen 1.5",
        "several pictures",
        parts=_QWEN15_05B,
    ),
    "llava-interleave-7b": Alias(
        "llava-hf/llava-interleave-qwen-7b-hf",
        8.17,
        "llava-interleave",
        "Qwen 1.5",
        "several pictures",
        parts=_QWEN15_7B,
    ),
    "vip-llava-7b": Alias(
        "llava-hf/vip-llava-7b-hf",
        7.06,
        "vip-llava",
        "Vicuna 1.5",
        "arrows and circles drawn on pictures",
        parts=_VICUNA_7B,
    ),
    "vip-llava-13b": Alias("llava-hf/vip-llava-13b-hf", 13.35, "vip-llava", "Vicuna 1.5", parts=_VICUNA_13B),
    "bakllava": Alias("llava-hf/bakLlava-v1-hf", 7.57, "bakllava", "Mistral 0.1", parts=_MISTRAL_7B),
    "smolvlm-256m": Alias(
        "HuggingFaceTB/SmolVLM-256M-Instruct", 0.26, "smolvlm", "SmolLM2", "the smallest", parts=_SMOLLM2_135M
    ),
    "smolvlm-500m": Alias(
        "HuggingFaceTB/SmolVLM-500M-Instruct", 0.51, "smolvlm", "SmolLM2", "small, quick on a CPU", parts=_SMOLLM2_360M
    ),
    "smolvlm2-2.2b": Alias(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        2.25,
        "smolvlm2",
        "SmolLM2",
        "several pictures, quick on a CPU",
        parts=_SMOLLM2_17B,
        bits=32,
    ),
    "qwen2-vl-2b": Alias(
        "Qwen/Qwen2-VL-2B-Instruct", 2.21, "qwen2-vl", "Qwen 2", "pictures in their own shape", parts=_QWEN2_VL_2B
    ),
    "qwen2-vl-7b": Alias(
        "Qwen/Qwen2-VL-7B-Instruct", 8.29, "qwen2-vl", "Qwen 2", "pictures in their own shape", parts=_QWEN2_VL_7B
    ),
    "qwen2.5-vl-3b": Alias(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        3.75,
        "qwen2.5-vl",
        "Qwen 2.5",
        "pictures in their own shape",
        parts=_QWEN25_VL_3B,
    ),
    "qwen2.5-vl-7b": Alias(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        8.29,
        "qwen2.5-vl",
        "Qwen 2.5",
        "pictures in their own shape",
        parts=_QWEN25_VL_7B,
    ),
    "qwen3-vl-2b": Alias(
        "Qwen/Qwen3-VL-2B-Instruct", 2.13, "qwen3-vl", "Qwen 3", "pictures in their own shape", parts=_QWEN3_VL_2B
    ),
    "qwen3-vl-4b": Alias(
        "Qwen/Qwen3-VL-4B-Instruct", 4.44, "qwen3-vl", "Qwen 3", "pictures in their own shape", parts=_QWEN3_VL_4B
    ),
    "qwen3-vl-8b": Alias(
        "Qwen/Qwen3-VL-8B-Instruct", 8.77, "qwen3-vl", "Qwen 3", "pictures in their own shape", parts=_QWEN3_VL_8B
    ),
    "gemma-3-4b": Alias(
        "google/gemma-3-4b-it", 4.30, "gemma-3", "Gemma 3", "several pictures, 256 tokens each", parts=_GEMMA3_4B
    ),
    "gemma-3-12b": Alias(
        "google/gemma-3-12b-it", 12.19, "gemma-3", "Gemma 3", "several pictures, 256 tokens each", parts=_GEMMA3_12B
    ),
    "gemma-3-27b": Alias(
        "google/gemma-3-27b-it", 27.43, "gemma-3", "Gemma 3", "several pictures, 256 tokens each", parts=_GEMMA3_27B
    ),
    "internvl3-1b": Alias(
        "OpenGVLab/InternVL3-1B-hf",
        0.94,
        "internvl3",
        "Qwen 2.5",
        "tiles: small text, wide pictures",
        parts=_INTERNVL3_1B,
    ),
    "internvl3-2b": Alias(
        "OpenGVLab/InternVL3-2B-hf",
        2.09,
        "internvl3",
        "Qwen 2.5",
        "tiles: small text, wide pictures",
        parts=_INTERNVL3_2B,
    ),
    "internvl3-8b": Alias(
        "OpenGVLab/InternVL3-8B-hf",
        7.94,
        "internvl3",
        "Qwen 2.5",
        "tiles: small text, wide pictures",
        parts=_INTERNVL3_8B,
    ),
}


def repo_of(name: str) -> str:
    """The Hub repo that an alias stands for; any other name as it is."""
    return ALIASES[name].repo if name in ALIASES else name
