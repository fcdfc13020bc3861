# mlx-lm, loaded from the checkpoint's directory by mlx-lm's own loader.
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy
import torch
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from conformance import Unsupported


class MlxLM:
    name, families = f"mlx-lm {version('mlx-lm')}", {"llama", "mistral", "mixtral", "phi"}
    dtypes = frozenset({"float32", "bfloat16", "float16"})

    def load(self, checkpoint):
        config, dtype = checkpoint.config, str(checkpoint.dtype).removeprefix("torch.")
        if config["model_type"] == "mixtral" and dtype != "float32":
            raise Unsupported("mlx multiplies by chosen experts (GatherMM) in float32 only, on a CPU")
        # mlx-lm takes 8 or 32 where config.json leaves it out
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        model, _ = load_model(Path(checkpoint.path), model_config={"num_key_value_heads": heads})
        model.set_dtype(getattr(mx, dtype))
        return Model(model)


class Model:
    def __init__(self, model, cache=None):
        self.model, self.cache = model, cache

    def __call__(self, input_ids):
        logits = self.model(mx.array(input_ids.numpy()), cache=self.cache)
        return torch.from_numpy(numpy.array(logits.astype(mx.float32)))

    def session(self):
        return Model(self.model, make_prompt_cache(self.model))

    feed = __call__
