"""mlx-lm 0.32.2 ignores fields of config.json, Mistral's window among them: shown without the suite.

pip install torch==2.13.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.23.0
"""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import torch
from mlx_lm.utils import load_model
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PhiConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.arange(13)[None]


def rope(kind="default", **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


# What is written beside, in the spelling of transformers 4.x
OLD, HALF = {"rope_theta": 10000.0}, {"partial_rotary_factor": 0.5}
LINEAR = {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}}
# What config.json says, what mlx-lm computes instead, and what is written beside
CASES = {
    "llama rope_theta": (LlamaConfig, rope(rope_theta=100.0), rope(), {}),
    "llama linear scaling": (LlamaConfig, rope("linear", factor=4.0), rope(), {}),
    "llama hidden_act": (LlamaConfig, {"hidden_act": "gelu"}, {}, {}),
    "mistral sliding_window": (MistralConfig, {"sliding_window": 5}, {"sliding_window": None}, {}),
    "mixtral sliding_window": (MixtralConfig, {"sliding_window": 5}, {"sliding_window": None}, {}),
    "mixtral linear scaling": (MixtralConfig, rope("linear", factor=4.0), rope(), OLD | LINEAR),
    "mixtral hidden_act": (MixtralConfig, {"hidden_act": "gelu"}, {}, {}),
    "phi linear scaling": (PhiConfig, rope("linear", factor=4.0), rope(), OLD | HALF | LINEAR),
    "phi rotary share": (PhiConfig, rope(partial_rotary_factor=0.5), rope(partial_rotary_factor=0.4), {}),
    "phi hidden_act": (PhiConfig, {"hidden_act": "relu"}, {}, OLD | HALF),
}  # fmt: skip


def build(kind, **changed):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, **changed)).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model


def mlx_logits(model, **in_config):
    """Of the checkpoint as transformers writes it, with so much added to its config.json."""
    directory = Path(tempfile.mkdtemp())
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | in_config))
    return torch.tensor(load_model(directory)[0](mx.array(IDS.tolist())).tolist())


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


for name, (kind, said, instead, beside) in CASES.items():
    model = build(kind, **said)
    logits = mlx_logits(model, **beside)
    truth, mistaken = model(IDS).logits.detach(), build(kind, **instead)(IDS).logits.detach()
    print(f"{name:<22} from the truth {distance(logits, truth):.1e}, from the mistake {distance(logits, mistaken):.1e}")
