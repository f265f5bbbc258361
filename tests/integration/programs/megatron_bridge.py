"""What megatron-bridge makes of a checkpoint, on the ranks that torchrun's variables name.

python megatron_bridge.py check  HF CHECKPOINT       does CHECKPOINT hold what the bridge reads from HF?
python megatron_bridge.py import HF CHECKPOINT       HF through the bridge into a new CHECKPOINT
python megatron_bridge.py export HF CHECKPOINT NEW   CHECKPOINT through the bridge into the HF folder NEW
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vespo.system.plugins import load_runtime_plugins

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def check(bridge, model, options: argparse.Namespace) -> None:
    """Exit code 1 and the names of the parameters that differ in any bit."""
    from megatron.core import dist_checkpointing

    bridge.load_hf_weights([model])
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(options.checkpoint))
    found = model.load_state_dict(state["model"], strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
    if missing or found.unexpected_keys:
        raise SystemExit(f"missing {missing}, unexpected {found.unexpected_keys}")
    different = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.dtype == expected[name].dtype
        or not parameter.view(_BITS[parameter.dtype]).equal(expected[name].view(_BITS[parameter.dtype]))
    ]
    if different:
        raise SystemExit(f"{len(different)} of {len(expected)} parameters differ: {different[:5]}")
    print(f"{len(expected)} parameters equal")


def import_(bridge, model, options: argparse.Namespace) -> None:
    from megatron.core import dist_checkpointing

    bridge.load_hf_weights([model])
    if dist.get_rank() == 0:
        options.checkpoint.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(options.checkpoint))


def export(bridge, model, options: argparse.Namespace) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(options.checkpoint))
    model.load_state_dict(state["model"], strict=False)
    # save_hf_weights without its question to ModelOpt whether the model is quantized
    tensors = bridge.export_hf_weights([model], cpu=True, show_progress=False)
    bridge.hf_pretrained.state.source.save_generator(tensors, options.target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=COMMANDS)
    parser.add_argument("hf", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    for size in ("tp", "pp", "ep"):
        parser.add_argument(f"--{size}", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    load_runtime_plugins()
    from bridge_model import auto_bridge, build_model

    config = json.loads((options.hf / "config.json").read_text())
    dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
    dist.init_process_group("gloo")
    bridge = auto_bridge(options.hf, config["architectures"][0], dtype)
    model = build_model(bridge, dtype, options.tp, options.pp, options.ep)
    started, processor = time.monotonic(), sum(os.times()[:4])
    COMMANDS[options.work](bridge, model, options)
    print(f"took {time.monotonic() - started:.2f} s, {sum(os.times()[:4]) - processor:.2f} s of processors")
    dist.destroy_process_group()


COMMANDS = {"check": check, "import": import_, "export": export}

if __name__ == "__main__":
    main()
