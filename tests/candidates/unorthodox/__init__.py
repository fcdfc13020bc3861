"""Right implementations that look nothing like the reference: none may fail a claim, be localised or be diagnosed.

Each replaces a piece of a plain skeleton (`skeleton.Decoder`), and can make one mistake there, with which it fails, so
that its passing means something.
"""

from dataclasses import dataclass
from typing import Any

from . import families, llama, recurrent, translator
from .skeleton import Adapter, Decoder

_NORM = "layers.0.attention.norm"
_VALUE, _KEY, _TURNED, _SCORES, _WEIGHTS, _CONTEXT, _OUTPUT, _RESIDUAL = (
    f"layers.0.attention.{part}"
    for part in ("value", "key", "query_rotated", "scores", "weights", "context", "output", "residual")
)


@dataclass(frozen=True)
class Variant:
    """cases: those of its family whose claims are put to it; those of properties only with `properties`.

    shown: the check, of a case, that its mistake fails; first: the first wrong probe that is found then, "" if none is,
    None where another than the fault is named, since the program never makes the right one.
    entry: what the mistake is called.
    """

    model: type[Decoder]
    first: str | None
    entry: str | None = None
    cases: tuple[str, ...] = ("distinct",)
    shown: tuple[str, str] = ("distinct", "golden.logits")
    properties: bool = False

    def __call__(self, wrong: bool = False) -> Adapter:
        return Adapter(self.model, wrong)

    def __str__(self) -> str:
        return self.model.__name__


_SESSION = ("distinct", "cache.prefill_decode")
_GROUPED = ("distinct", "mqa")
VARIANTS = (
    Variant(llama.FusedMatrices, "layers.0.attention.key_rotated", "qkv-k-v-swapped", _GROUPED),
    Variant(llama.InterleavedRotary, _TURNED, "rope-layout"),
    Variant(llama.ComplexRotary, _TURNED, "rope-layout"),
    Variant(llama.ComplexHalves, _TURNED, "rope-sign"),
    Variant(llama.Transposed, None, None, ("distinct", "square"), ("square", "golden.logits")),
    Variant(llama.FoldedNorms, _VALUE),
    Variant(llama.RepeatedKeyValues, _KEY, "gqa-tile", _GROUPED),
    Variant(llama.AbsorbedOutput, None, "heads-merged-fastest"),
    Variant(llama.Einsum, _SCORES, "gqa-tile", _GROUPED),
    Variant(llama.Kernel, _CONTEXT, "causal-mask-dropped", _GROUPED, properties=True),
    Variant(llama.RunningSoftmax, _CONTEXT),
    Variant(llama.LogSumExp, _WEIGHTS, "attn-mask-after-softmax"),
    Variant(llama.MaskedExponentials, _WEIGHTS, "attn-mask-after-softmax", properties=True),
    Variant(llama.RotationMatrices, _TURNED, "rope-sign"),
    Variant(llama.FarPositions, _TURNED, "decode-position-restart", shown=_SESSION),
    Variant(llama.WideStream, "final_norm", "final-norm-missing", ("plain",)),
    Variant(llama.InPlace, _RESIDUAL, "prenorm-residual-from-normed", properties=True),
    Variant(llama.TokenMajor, _CONTEXT, None, _GROUPED, _SESSION, True),
    Variant(llama.SequenceFirst, "", properties=True),
    Variant(llama.Convolutions, _NORM, "rms-over-tokens"),
    Variant(llama.HeadByHead, _OUTPUT, "gqa-tile", _GROUPED),
    Variant(llama.Vmapped, _SCORES, "attn-scale-missing"),
    Variant(llama.TokenByToken, "layers.0"),
    Variant(llama.Unpadded, _CONTEXT, properties=True),
    Variant(llama.Numpy, "layers.0", "attn-scale-missing", _GROUPED, properties=True),
    Variant(families.Bands, _CONTEXT, None, ("distinct", "window"), _SESSION, True),
    Variant(families.DenseExperts, "layers.0.feed_forward.output", None, ("unbalanced",)),
    Variant(families.SortedDispatch, "layers.0.feed_forward.expert_outputs", properties=True),
    Variant(families.GatheredExperts, "layers.0.feed_forward.expert_outputs", "swiglu-swap", ("unbalanced",)),
    Variant(families.FusedParallel, None, "ffn-down-bias-dropped", ("distinct", "gqa")),
    Variant(families.UnfusedLinears, "layers.0.attention.query", "qkv-fused-per-head", properties=True),
    Variant(translator.JointMemory, "decoder.layers.0.cross_attention.context", properties=True),
)
COMPILED = Variant(llama.Compiled, "layers.0")
# component -> a function of it, right unless it is made with wrong=True
COMPONENTS: dict[str, Any] = {
    "rnn": recurrent.merged_biases,
    "lstm": recurrent.gates_reordered,
    "gru": recurrent.half_merged,
}

__all__ = ["COMPILED", "COMPONENTS", "VARIANTS", "Adapter", "Decoder", "Variant"]
