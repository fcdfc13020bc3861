"""The published configurations of the families, and how many parameters each has.

A checkpoint of a published model has exactly these tensors; a port that builds fewer or more parameters has misread a
size (a feed-forward width rounded the wrong way, a bias left out, a head that should be tied).  The counts are those of
Hugging Face's classes (GPT-3, which it lacks: of its GPT-2 at GPT-3's sizes; Transformer-XL, which it dropped: of
4.35.2), with which the reference agrees name by name (`tests/conformance/test_sizes.py`, and for Transformer-XL
`test_transformer_xl_oracle.py`, where a release that has it is installed).

A new model is one more entry; a config holds the keys that differ from the family's defaults or that the paper states.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published model.

    name: as its authors call it.
    family: the family of this suite; its config.json is `config`.
    parameters: how many numbers the model learns, a tied table counted once.
    printed: the figure that the authors print, with their precision: "6.7B".  They round or cut.  None: they print none
        that the count meets.
    contradicted: figures that the authors print elsewhere and that the count does not meet.
    omitted: parameters that the printed figure leaves out, by name.
    source: where sizes and figure stand.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    parameters: int
    printed: str | None
    contradicted: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    source: str


_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_figure(printed: str) -> tuple[float, float]:
    """The number that a figure like "6.7B" stands for, and the worth of its last significant digit.

    "6.7B" is (6.7e9, 1e8); "13.0B" (1.3e10, 1e8); "70B" (7e10, 1e10), since nobody says whether its 0 is one.
    """
    digits, unit = printed[:-1], _UNITS[printed[-1]]
    whole, _, decimals = digits.partition(".")
    trailing_zeros = 0 if decimals else len(whole) - len(whole.rstrip("0"))
    return float(digits) * unit, unit * 10.0 ** (trailing_zeros - len(decimals))


def _gpt(model_type: str, vocab: int, context: int, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "n_positions": context,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
    }


# 40,000 merges and 478 symbols to start from: 40,478 rows.  GPT's own paper prints no count; GPT-2's prints 117M for a
# smallest model that it calls equivalent to GPT, and that is GPT's count.
_GPT = (
    "sizes: Radford et al. 2018, section 4.1; vocabulary: config.json of openai-community/openai-gpt; "
    "figure: Radford et al. 2019, table 2"
)
# The paper's table 2 prints 117M, 345M, 762M and 1542M.  The README of openai/gpt-2 says that the paper's counts "were
# wrong due to an error", not which.  All four are what the models would have with GPT's 40,478 rows instead of 50,257.
_GPT_2 = (
    "sizes: Radford et al. 2019, table 2 and section 2.3; heads: hparams.json of the published weights; "
    "figure: the weights' names in openai/gpt-2"
)
# Table 2.1 prints 175.0B, its rounded name; table D.1 of the same paper prints 174,600 million, which is the count.
_GPT_3 = "Brown et al. 2020, arXiv:2005.14165, table 2.1 and section 2.1; vocabulary of GPT-2; figure: table D.1"
# The paper does not state the width of the band.  No parameter depends on it; one as wide as the context hides nothing.
_GPT_3_BAND = {"attention_pattern": ["dense", "banded"], "window_size": 2048}


def _llama(
    hidden: int, feed_forward: int, layers: int, heads: int, key_value_heads: int, eps: float, context: int
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "rms_norm_eps": eps,
        "max_position_embeddings": context,
    }


# LLaMA's paper gives 2/3 · 4d for the feed-forward width; the published code rounds it up to a multiple of 256.
_LLAMA_1 = "Touvron et al. 2023, arXiv:2302.13971, table 2 and section 2.2; widths and ε from facebookresearch/llama"
# The 70B model widens by 1.3, to a multiple of 4096: int(1.3 · int(2/3 · 4 · 8192)) = 28398 → 28672.
_LLAMA_2 = "Touvron et al. 2023, arXiv:2307.09288, table 1; sizes from the params.json of the published weights"


def _mistral(model_type: str, **more: Any) -> dict[str, Any]:
    """The sizes that Mistral 7B shares with one expert of Mixtral 8x7B."""
    return _llama(4096, 14336, 32, 32, 8, 1e-5, 32768) | {"model_type": model_type, **more}


# The paper gives a context of 8192; config.json lets positions run to 32,768.  The announcement prints 7.3B.
_MISTRAL = (
    "sizes and figure: Jiang et al. 2023, arXiv:2310.06825, table 1 and abstract; "
    "ε and context: config.json of mistralai/Mistral-7B-v0.1"
)
# Eight experts share attention, norms and tables, so that 8x7B is not 56B.  The paper prints 47B.
_MIXTRAL = (
    "sizes: Jiang et al. 2024, arXiv:2401.04088, table 1; ε and θ: config.json of mistralai/Mixtral-8x7B-v0.1; "
    "figure: Mistral AI, 11 December 2023, Mixtral of experts"
)


def _phi(hidden: int, layers: int, partial_rotary_factor: float) -> dict[str, Any]:
    return {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "partial_rotary_factor": partial_rotary_factor,
        "max_position_embeddings": 2048,
    }


# Embedding and head are two tables of 51,200 rows: 1.42 billion with both, the 1.3 that is printed with one of them.
_ONE_TABLE = ("model.embed_tokens.weight",)
_PHI_1 = "Gunasekar et al. 2023, arXiv:2306.11644, section 2.3; vocabulary from the config.json of microsoft/phi-1"
_PHI_15 = "Li et al. 2023, arXiv:2309.05463, section 2.1; vocabulary from the config.json of microsoft/phi-1_5"
_PHI_2 = "Microsoft Research, 12 December 2023, blog and the config.json of microsoft/phi-2"

_XL_STANDARD = {
    "model_type": "transfo-xl",
    "vocab_size": 267735,
    "cutoffs": [20000, 40000, 200000],
    "d_model": 410,
    "d_embed": 410,
    "div_val": 1,
    "n_layer": 16,
    "n_head": 10,
    "d_head": 41,
    "d_inner": 2100,
    "untie_r": False,
}
_XL_LARGE = _XL_STANDARD | {
    "d_model": 1024,
    "d_embed": 1024,
    "div_val": 4,
    "n_layer": 18,
    "n_head": 16,
    "d_head": 64,
    "d_inner": 4096,
    "untie_r": True,
}
# The published weights of the large model, transfo-xl-wt103 on the hub, are 285 million numbers.  Table 1 prints 257M
# and says not of what; with 16 of the 18 layers the model would have 257,919,818.
_XL = "figure: Dai et al. 2019, arXiv:1901.02860, table 1; sizes: "
# Every second layer is sparse.  The released weights have feed-forward layers of two matrices, 4 · d_model wide.
_SWITCH_BASE = {
    "model_type": "switch_transformers",
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "num_experts": 128,
}
_SWITCH = "sizes: config.json of google/switch-base-128; figure: Fedus et al. 2021, arXiv:2101.03961, table 9"

PUBLISHED: tuple[Published, ...] = (
    Published(name="GPT", family="gpt", config=_gpt("openai-gpt", 40478, 512, 768, 12, 12),
              parameters=116_534_784, printed="117M", source=_GPT),
    Published(name="GPT-2 small", family="gpt2", config=_gpt("gpt2", 50257, 1024, 768, 12, 12),
              parameters=124_439_808, printed="124M", contradicted=("117M",), source=_GPT_2),
    Published(name="GPT-2 medium", family="gpt2", config=_gpt("gpt2", 50257, 1024, 1024, 24, 16),
              parameters=354_823_168, printed="355M", contradicted=("345M",), source=_GPT_2),
    Published(name="GPT-2 large", family="gpt2", config=_gpt("gpt2", 50257, 1024, 1280, 36, 20),
              parameters=774_030_080, printed="774M", contradicted=("762M",), source=_GPT_2),
    Published(name="GPT-2 XL", family="gpt2", config=_gpt("gpt2", 50257, 1024, 1600, 48, 25),
              parameters=1_557_611_200, printed="1558M", contradicted=("1542M",), source=_GPT_2),
    Published(name="GPT-3 175B", family="gpt3", config=_gpt("gpt3", 50257, 2048, 12288, 96, 96) | _GPT_3_BAND,
              parameters=174_604_259_328, printed="174600M", contradicted=("175.0B",), source=_GPT_3),
    Published(name="LLaMA 7B", family="llama", config=_llama(4096, 11008, 32, 32, 32, 1e-6, 2048),
              parameters=6_738_415_616, printed="6.7B", source=_LLAMA_1),
    Published(name="LLaMA 13B", family="llama", config=_llama(5120, 13824, 40, 40, 40, 1e-6, 2048),
              parameters=13_015_864_320, printed="13.0B", source=_LLAMA_1),
    Published(name="LLaMA 33B", family="llama", config=_llama(6656, 17920, 60, 52, 52, 1e-6, 2048),
              parameters=32_528_943_616, printed="32.5B", source=_LLAMA_1),
    Published(name="LLaMA 65B", family="llama", config=_llama(8192, 22016, 80, 64, 64, 1e-6, 2048),
              parameters=65_285_660_672, printed="65.2B", source=_LLAMA_1),
    Published(name="Llama 2 7B", family="llama", config=_llama(4096, 11008, 32, 32, 32, 1e-5, 4096),
              parameters=6_738_415_616, printed="7B", source=_LLAMA_2),
    Published(name="Llama 2 13B", family="llama", config=_llama(5120, 13824, 40, 40, 40, 1e-5, 4096),
              parameters=13_015_864_320, printed="13B", source=_LLAMA_2),
    Published(name="Llama 2 70B", family="llama", config=_llama(8192, 28672, 80, 64, 8, 1e-5, 4096),
              parameters=68_976_648_192, printed="70B", source=_LLAMA_2),
    Published(name="Mistral 7B v0.1", family="mistral", config=_mistral("mistral", sliding_window=4096),
              parameters=7_241_732_096, printed="7B", source=_MISTRAL),
    Published(name="Mixtral 8x7B v0.1", family="mixtral",
              config=_mistral("mixtral", num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6),
              parameters=46_702_792_704, printed="46.7B", source=_MIXTRAL),
    Published(name="Phi-1", family="phi", config=_phi(2048, 24, 0.5),
              parameters=1_418_270_720, printed="1.3B", omitted=_ONE_TABLE, source=_PHI_1),
    Published(name="Phi-1.5", family="phi", config=_phi(2048, 24, 0.5),
              parameters=1_418_270_720, printed="1.3B", omitted=_ONE_TABLE, source=_PHI_15),
    Published(name="Phi-2", family="phi", config=_phi(2560, 32, 0.4),
              parameters=2_779_683_840, printed="2.7B", source=_PHI_2),
    Published(name="Transformer-XL Standard", family="transformer_xl", config=_XL_STANDARD, parameters=151_107_538,
              printed="151M", source=_XL + "pytorch/run_wt103_base.sh of kimiyoung/transformer-xl"),
    Published(name="Transformer-XL Large", family="transformer_xl", config=_XL_LARGE, parameters=285_205_322,
              printed=None, contradicted=("257M",), source=_XL + "config.json of transfo-xl/transfo-xl-wt103"),
    Published(name="Switch-Base", family="switch_transformer", config=_SWITCH_BASE,
              parameters=7_415_217_408, printed="7B", source=_SWITCH),
)  # fmt: skip
