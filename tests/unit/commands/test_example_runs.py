"""Every run that examples/ start is planned: Megatron parses its flags and builds the model on all its ranks.

Scripts run in a folder of stand-ins, which note the flags that the program would have got. Plans import
Megatron, which changes the process: one child does it for all tests.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
from pathlib import Path

import pytest

from megatron_vespo.commands.plan.command import main, parsed
from tests.support.recipes import CONFIGS, RECIPES

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
# script -> (runs, trainer ranks) of each
SCRIPTS = {
    "tiny/run.sh": (1, 4),
    "asynchronous/run.sh": (6, 1),
    "calculator/run.sh": (1, 4),
    "code/run.sh": (1, 4),
    "distillation/run.sh": (7, 1),
    "smollm2/run.sh": (1, 1),
}
PYTHON_PROGRAMS = {"staleness_study/run.sh"}  # its runs are a table's, see below
NOTES = '#!/bin/bash\nprintf "%s\\0" "$@" >>"${0%/*}/given"; echo >>"${0%/*}/given"\n'


def planned(words: list[str]) -> tuple[int, str]:
    """Exit code and words of `megatron-vespo plan`."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return main(words), said.getvalue()


def ranks_of(flags: list[str]) -> int:
    settings, stages = parsed(flags)
    assert len(stages) == settings.trainer.pipeline_model_parallel_size
    return settings.trainer.trainer_ranks


def write_config(folder: Path, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_nodes(child, tmp_path, recipe):
    model = write_config(tmp_path, CONFIGS[recipe.partition("/")[0]])
    nodes = str(RECIPES[recipe] // 8)
    code, said = child(
        planned, [str(EXAMPLES / f"{recipe}.flags"), "--nodes", nodes, "--hf-checkpoint", model]
    )
    assert code == 0 and said.endswith("fits\n"), said
    # a batch that trains is finished and saved before a preempted run ends
    assert "--preemption-deadline" not in said


def given_flags(script: str, folder: Path) -> list[list[str]]:
    """What the script gives to `megatron-vespo train`, a list for each run."""
    copy = folder / "examples" / script
    binaries = folder / ".venv/bin"
    for path in (copy, binaries / "x", folder / "patches/cpu/x"):
        path.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text((EXAMPLES / script).read_text())
    (folder / "patches/cpu/setup_env.sh").write_text("")
    for name, text in {"python": "#!/bin/bash\n", "megatron-vespo": NOTES}.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    subprocess.run(["bash", str(copy)], check=True, timeout=60)
    runs = [line.split("\0")[:-1] for line in (binaries / "given").read_text().splitlines()]
    assert all(run[0] == "train" for run in runs)
    return [run[1:] for run in runs]


def test_all_scripts_are_here():
    assert {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("run.sh")} == {
        *SCRIPTS,
        *PYTHON_PROGRAMS,
    }


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_runs_of_a_script(child, tmp_path, monkeypatch, script):
    monkeypatch.syspath_prepend(EXAMPLES / "tiny")
    make_base_model = importlib.import_module("make_base_model")
    base = make_base_model.make_model(make_base_model.Recipe(), make_base_model.make_tokenizer())
    # what saving it adds
    model = write_config(tmp_path, base.config.to_dict() | {"architectures": [type(base).__name__]})
    of_teachers = "examples/distillation/work/teacher/hf"  # what another run of the script leaves
    runs = [[model if word == of_teachers else word for word in run] for run in given_flags(script, tmp_path)]
    assert (len(runs), *{child(ranks_of, [*run, "--hf-checkpoint", model]) for run in runs}) == SCRIPTS[
        script
    ]


@pytest.mark.long
def test_the_runs_of_the_study(child, tmp_path, monkeypatch):
    """Those in its process and those on the real stack: each method with its options once."""
    monkeypatch.syspath_prepend(EXAMPLES / "staleness_study")
    study, design, table, trial, base_model, real_stack = map(
        importlib.import_module, ["study", "design", "table", "trial", "base_model", "real_stack"]
    )
    model = Path(write_config(tmp_path, base_model.config().to_dict()))
    (tmp_path / "base").symlink_to(model)
    records = {record["key"]: record for record in study.read_records(study.HERE / "results/runs.jsonl")}
    trials = {(t.method, t.options): t for t in design.trials(list(records.values()))}
    assert len(trials) > 12
    for one in trials.values():
        assert child(ranks_of, trial.flags(one, model)) == 1
    on_real_stack = {t.method: t for t in table.real_stack_trials(records)}
    assert on_real_stack.keys() == {"vespo", "grpo"}
    for one in on_real_stack.values():
        assert child(ranks_of, real_stack.command_line(one, tmp_path)) == 2


@pytest.mark.long
def test_a_wrong_flag_is_refused(child, tmp_path):
    """What stands in no script yet would be seen."""
    model = write_config(tmp_path, CONFIGS["qwen3_8b"])
    right = (
        f"--hf-checkpoint {model} --prompt-data d --output-dir o --train-iters 8 --lr 1e-6 --trainer-ranks 4"
    )
    assert child(ranks_of, right.split()) == 4
    for wrong in ("--learning-rate 1", "--tensor-model-parallel-size 3", "--sglang-tensor-size 2", "--lr x"):
        with pytest.raises((ValueError, SystemExit)):
            child(ranks_of, [*right.split(), *wrong.split()])
