"""Makes the tables of tests/distributed/README.md: `megatron-vespo check layout` on a random tiny model.

    .venv/bin/python tests/distributed/layout_table.py

Takes about six minutes on two cores; exits with 1 when a layout is above a bound.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: layout_table.py -->", "<!-- end of tables -->"
FP32 = (
    "tp2 pp2 pp2,vpp2 cp2 ep2 etp2 dp2 tp2,pp2 tp2,cp2 tp2,ep2 tp2,etp2,ep2 pp2,cp2 cp2,ep2 cp4 pp2,vpp2,ep2 "
    "pp2,vpp2,cp2 tp2,pp2,ep2 pp2,ep2,dp2 tp2,pp2,cp2 tp2,pp2,ep2,dp2 pp2,ep2,dp4 tp2,pp2,vpp2,cp2,ep4"
).split()
ALLGATHER = ["ep2", "cp2,ep2", "tp2,ep2", "pp2,ep2", "tp2,pp2,ep2"]
BF16 = ["tp2", "pp2", "pp2,vpp2", "cp2", "ep2", "etp2", "tp2,cp2", "tp2,pp2,ep2"]
RUNS = {
    "fp32, all-to-all dispatcher": (FP32, []),
    "fp32, all-gather dispatcher": (ALLGATHER, ["--moe-token-dispatcher-type", "allgather"]),
    "bf16 with fp32 main gradients, all-to-all dispatcher": (BF16, ["--bf16"]),
}


def main() -> int:
    tables, codes = [], []
    with tempfile.TemporaryDirectory() as folder:
        model, table = Path(folder) / "model", Path(folder) / "table.md"
        # an interpreter of its own: the reference implementation must not see this machine's replacements
        code = (
            "from pathlib import Path; from transformers_log_probs import QWEN3_MOE, make_model; "
            f"make_model(Path({str(model)!r}), QWEN3_MOE, {{}})"
        )
        subprocess.run([sys.executable, "-c", code], cwd=HERE / "programs", check=True)
        for title, (candidates, flags) in RUNS.items():
            command = [sys.executable, "-m", "megatron_vespo", "check", "layout", *flags]
            command += ["--hf-checkpoint", str(model), "--markdown", str(table)]
            command += ["--steps", "3", "--lr", "1e-5", "--candidate", *candidates]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
            codes.append(done.returncode)
            tables.append(f"### {title}\n\n{table.read_text()}")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(before + BEGIN + "\n\n" + "\n".join(tables) + "\n" + END + after)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
