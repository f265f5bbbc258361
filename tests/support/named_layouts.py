"""Parallel layouts that tests name: number of ranks and flags."""

VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank 2"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules moe"
LAYOUTS = {
    "one rank": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "ep2": (2, "--expert-model-parallel-size 2"),
    "dp2": (2, ""),
    "dp2, small packs": (2, "--max-tokens-per-gpu 64"),
    "dp2, overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "pp2 vpp2": (2, f"--pipeline-model-parallel-size 2 {VIRTUAL_STAGES}"),
    "cp2": (2, "--context-parallel-size 2"),
    "etp2": (2, "--expert-tensor-parallel-size 2"),
    "cp2 ep2, allgather": (2, "--context-parallel-size 2 --expert-model-parallel-size 2 "
                              "--moe-token-dispatcher-type allgather"),
    "ep2, allgather": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
    "one rank, recompute": (1, RECOMPUTE),
    "one rank, selective": (1, SELECTIVE),
    "tp2 cp2": (4, "--tensor-model-parallel-size 2 --context-parallel-size 2"),
    "pp2 vpp2 cp2, recompute, overlap": (4, f"--pipeline-model-parallel-size 2 {VIRTUAL_STAGES} {RECOMPUTE} "
                                            "--context-parallel-size 2 --overlap-grad-reduce"),
    "tp2 pp2 ep2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                       "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
}  # fmt: skip
