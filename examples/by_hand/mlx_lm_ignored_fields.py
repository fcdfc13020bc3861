"""mlx-lm 0.32.2 ignores `rope_parameters` and `hidden_act` of a Llama: shown without the suite.

pip install torch==2.13.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.23.0
"""

import tempfile
from pathlib import Path

import mlx.core as mx
import torch
from mlx_lm.utils import load_model
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6}
IDS = torch.arange(13)[None]


def build(**changed):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **changed)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


for name, changed in {
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "hidden_act": {"hidden_act": "gelu"},
}.items():
    model = build(**changed)
    directory = Path(tempfile.mkdtemp())
    model.save_pretrained(directory)
    logits = torch.tensor(load_model(directory)[0](mx.array(IDS.tolist())).tolist())
    truth, default = model(IDS).logits.detach(), build()(IDS).logits.detach()
    print(f"{name:<15} from the truth {distance(logits, truth):.1e}, from the default {distance(logits, default):.1e}")
