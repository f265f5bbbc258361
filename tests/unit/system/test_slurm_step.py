"""What a task of SLURM knows of its step."""

from megatron_vespo.system.slurm_step import Step, current_step


def test_a_step_of_slurm():
    script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]"}
    assert current_step(script) is None
    task = script | {
        "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "3",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    }  # fmt: skip
    assert current_step(task) == Step(rank=1, size=2, local_rank=0, word="7.3", nodes="n[1-2]")


def test_a_step_on_two_components_begins_on_the_first_ones_nodes():
    job = {"SLURM_HET_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "3"}
    for group, (number, nodes) in enumerate([("1", "n3"), ("2", "n[1-2]")]):
        job[f"SLURM_JOB_NUM_NODES_HET_GROUP_{group}"] = number
        job[f"SLURM_JOB_NODELIST_HET_GROUP_{group}"] = nodes
    on_both = current_step(job | {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_NUM_NODES": "3"})
    on_second = current_step(job | {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2"})
    assert (on_both.nodes, on_second.nodes) == ("n3", "n[1-2]")
