"""Families that share a part, for entries to name."""

LLAMAS = ("llama", "mistral", "mixtral")
GPTS = ("gpt", "gpt2", "gpt3")
# Decoders with rotary positions, and all decoders.
TURNING = (*LLAMAS, "phi")
DECODERS = (*GPTS, *TURNING)
MODELS = ("transformer", *DECODERS)
# Models with attention weights of their own making: relative positions, T5's blocks.
OTHERS = ("transformer_xl", "switch_transformer")
# Models whose keys are seen through a sliding window in some case.
WINDOWED = ("mistral", "mixtral", "gpt3")
