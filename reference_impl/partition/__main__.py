"""Greedy continuation of a prompt by a model that is spread over the processes of torchrun.

    torchrun --nproc-per-node 3 -m reference_impl.partition --checkpoint DIR --ids 1,15,4 --split 2,2,1
    torchrun --nproc-per-node 2 -m reference_impl.partition --checkpoint DIR --ids 1,15,4 --by columns

Prints the token ids and the logit of each. Every process keeps the cache of its own part.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from reference_impl.generation import left_padded
from reference_impl.partition.pipeline import even_split, load_stage, number_of_blocks
from reference_impl.partition.tensor_parallel import load_tensor_parallel

DTYPES = ("float64", "float32", "bfloat16", "float16")


def numbers(text: str) -> list[int]:
    """`1,15,4` → [1, 15, 4]."""
    return [int(number) for number in text.split(",")]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m reference_impl.partition", description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="Hugging Face directory of a decoder")
    parser.add_argument("--ids", required=True, type=numbers, metavar="N,N,…", help="token ids of the prompt")
    parser.add_argument("--new-tokens", type=int, default=1, help="how many to generate (%(default)s)")
    parser.add_argument("--by", choices=("blocks", "columns"), default="blocks", help="pipeline or tensor parallel")
    parser.add_argument("--split", type=numbers, metavar="N,N,…", help="blocks of each process (as even as can be)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument("--backend", default="gloo", help="of torch.distributed; nccl: on CUDA (%(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that one waits for another (%(default)s)")
    options = parser.parse_args(argv)
    if options.new_tokens < 1 or not options.timeout > 0:
        parser.error(f"--new-tokens {options.new_tokens} must be at least 1, --timeout {options.timeout} more than 0")
    return options


def load(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """This process's part of the model."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    ranks = dist.get_world_size()
    if options.by == "columns":
        if options.split is not None:
            raise ValueError("--split shares out blocks; it does not go with --by columns")
        return load_tensor_parallel(options.checkpoint, init_device_mesh(device.type, (ranks,)), dtype=dtype)
    split = options.split or even_split(number_of_blocks(options.checkpoint), ranks)
    if len(split) != ranks:
        raise ValueError(f"--split {split} names {len(split)} stages for {ranks} processes; start as many")
    return load_stage(options.checkpoint, split=split, stage=dist.get_rank(), dtype=dtype, device=device)


def greedy(model: nn.Module, ids: Tensor, new_tokens: int) -> list[tuple[int, float]]:
    """The most likely continuation of one row: token ids and their logits, the same in every process.

    The last process chooses (it has logits in either partition) and tells the others.
    """
    session = model.session()  # type: ignore[operator]
    last = dist.get_world_size() - 1
    found = []
    for _ in range(new_tokens):
        logits = session.feed(ids)
        choice = torch.zeros(2, dtype=torch.float64, device=ids.device)  # token, logit
        if dist.get_rank() == last:
            value, token = logits[0, -1].max(dim=-1)
            choice = torch.stack((token.to(torch.float64), value.to(torch.float64)))
        dist.broadcast(choice, src=last)
        found.append((int(choice[0]), float(choice[1])))
        ids = choice[:1].long()[None]  # (1, 1)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in one of the processes; returns the exit status. torchrun ends the others, and with 1."""
    options = arguments(argv)
    if "RANK" not in os.environ:
        print("error: start it with torchrun --nproc-per-node N -m reference_impl.partition …", file=sys.stderr)
        return 2
    try:
        run(options)
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch's, of a device, a backend or another process
        print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Generates, and prints in the first process."""
    if not dist.is_backend_available(options.backend):
        raise ValueError(f"--backend {options.backend} is not in this build of torch, or no backend; gloo is for CPUs")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if options.backend == "nccl" else torch.device("cpu")
    dist.init_process_group(options.backend, timeout=timedelta(seconds=options.timeout))
    try:
        model = load(options, device)
        ids, _ = left_padded([options.ids], vocab_size=model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        found = greedy(model, ids.to(device), options.new_tokens)
        if dist.get_rank() == 0:
            for token, logit in found:
                print(f"{token}\t{logit:.6g}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    status = main()
    # Not the interpreter's own way out: under load it now and then takes down a thread of the backend at work, and the
    # process aborts although all is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
