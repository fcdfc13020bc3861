"""mlx-lm's Llama, loaded from the checkpoint's directory by mlx-lm's own loader."""

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy
import torch
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


class MlxLM:
    name, families, dtypes = f"mlx-lm {version('mlx-lm')}", {"llama"}, {"float32"}

    def load(self, checkpoint):
        model, _ = load_model(Path(checkpoint.path))
        return Llama(model)


class Llama:
    def __init__(self, model, cache=None):
        self.model, self.cache = model, cache

    def __call__(self, input_ids):
        return torch.from_numpy(numpy.array(self.model(mx.array(input_ids.numpy()), cache=self.cache)))

    def session(self):
        return Llama(self.model, make_prompt_cache(self.model))

    feed = __call__
