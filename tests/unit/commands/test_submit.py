"""`megatron-vespo submit`: the command of sbatch, what it refuses, and the jobs it queues."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_vespo.arguments.sbatch_options import check_words
from megatron_vespo.commands.main import run
from megatron_vespo.commands.submit.command import SCRIPT
from megatron_vespo.commands.submit.sbatch_command import (
    directives,
    sbatch_command,
    seconds_before_limit,
    shown,
    time_limit,
)
from tests.support.recipes import CONFIGS


def test_a_command_as_it_is_shown():
    options = {"job-name": "my run", "time": "1:00:00", "no-requeue": None}
    flags = ["--lr", "1e-6", "--vespo-positive", "2", "3", "--bf16", "--prompt-key", "it's"]
    script = Path("/a b/train.sbatch")
    command = sbatch_command(script, options, {"VESPO_ROOT": "/a b", "VESPO_MOUNTS": "/a,/b"}, flags)
    assert shown(command) == (
        """\
sbatch \\
    --parsable \\
    '--job-name=my run' \\
    --time=1:00:00 \\
    --no-requeue \\
    '/a b/train.sbatch' \\
    'VESPO_ROOT=/a b' \\
    VESPO_MOUNTS=/a,/b \\
    --lr 1e-6 \\
    --vespo-positive 2 3 \\
    --bf16 \\
    --prompt-key 'it'"'"'s'"""
    )


@pytest.mark.parametrize(
    "words", [["--a", "b c", "--d", "$HOME `x` \\"], ["--text", "two\nlines", "", "--e", "'", "#1", "ünï"]]
)
def test_a_shell_reads_the_same_words(words):
    pasted = shown(["printf", r"%s\0", *words])
    told = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.split("\0")[:-1] == words


def test_a_value_that_is_a_colon():
    assert sbatch_command(SCRIPT, {}, {}, ["--a", ":", "--b", "::"])[-3:] == ["--a=:", "--b", "::"]
    for flags in (["--a", "b", ":"], ["--a=b", ":"], [":"]):
        with pytest.raises(ValueError, match=r": sbatch drops the word ':'$"):
            sbatch_command(SCRIPT, {}, {}, flags)


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.sbatch")), ids=lambda path: path.name)
def test_the_scripts_headers_are_read(script):
    text = script.read_text()
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert len(directives(text)) == len(lines) > 5


def test_the_training_script_asks_for_its_signal_in_time():
    assert seconds_before_limit(directives(SCRIPT.read_text())) == 600


def words_of(text: str) -> list[str]:
    """The shown command as a shell reads it."""
    return shlex.split(text.partition("\nchecked: ")[0].replace("\\\n", " "))


def components(text: str) -> list[dict[str, str | None]]:
    """The options of each component of the shown command."""
    words = words_of(text)
    assert words[:2] == ["sbatch", "--parsable"]
    found: list[dict[str, str | None]] = [{}]
    for word in words[2 : words.index(str(SCRIPT))]:
        if word == ":":
            found.append({})
        else:
            name, equals, value = word.removeprefix("--").partition("=")
            found[-1][name] = value if equals else None
    return found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "h100"], "--partition .*--sbatch partition=h100$"),
        (["--partition=h100"], "--partition .*--sbatch partition=h100$"),
        (["-p", "h100"], "-p .*--sbatch partition=h100$"),
        (["--exclusive", "--lr", "1"], "--exclusive .*--sbatch exclusive$"),
        (["--comment", "two words"], "--comment .*--sbatch 'comment=two words'$"),
        (["--lr", "1", "--account"], "--account .*--sbatch account$"),
    ],
)
def test_options_of_sbatch_among_a_runs_flags(words, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        check_words(words)
    check_words(["--save", "partition", "--lr", "-1e-3", "--prompt-key", "account"])


@pytest.fixture
def recipe(tmp_path) -> Path:
    """24 GPUs; the checkpoint is a config."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIGS["qwen3_8b"]))
    path = tmp_path / "small.flags"
    path.write_text(
        f"--hf-checkpoint {model} --prompt-data d --output-dir o --save c --load c # where\n"
        "--trainer-ranks 8 --rollout-engines 8 --sglang-tp-size 2 --train-iters 8 --lr 1e-6\n"
        "--bf16 --max-tokens-per-gpu 2048\n"
    )
    return path


def submit(recipe: Path, *more: str) -> int:
    return run(["submit", str(recipe), "--nodes", "3", *more])


def test_a_dry_run_shows_and_checks(recipe, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    more = "--dry-run --venv / --time 30 --sbatch partition=h100 exclusive=user --lr 1e-5".split()
    assert submit(recipe, *more) == 0
    shown = capsys.readouterr().out
    [options] = components(shown)
    assert options == {
        "job-name": "small", "nodes": "3", "gpus-per-node": "8", "time": "30", "partition": "h100",
        "exclusive": "user",
    }  # fmt: skip
    assert shown.count("    --lr 1e-5\n") == 1 and shown.count("--lr 1e-6") == 1
    assert "VESPO_VENV=/ \\\n" in shown and "VESPO_CONTAINER" not in shown
    assert shown.splitlines()[-1] == "checked: 8 trainer ranks and 8 engines of 2 GPUs use 24 of 24 GPUs"


def test_a_recipe_whose_name_has_a_space(recipe, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    recipe = recipe.rename(recipe.with_name("my small recipe.flags"))
    assert submit(recipe, "--dry-run", "--sbatch", "comment=two words", "--sbatch", "partition=h100") == 0
    [options] = components(capsys.readouterr().out)
    assert options["job-name"] == "my small recipe" and options["comment"] == "two words"
    assert options["partition"] == "h100", "given twice, both count"


def test_the_command_has_paths_as_they_are_read_here(recipe, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/my own")
    more = ["--save=~/c", "--load", "${HOME}/c", "--output-dir", "$SCRATCH/o", "--answer-pattern", "$X(.*)$"]
    assert submit(recipe, "--dry-run", *more) == 0
    shown = capsys.readouterr().out
    lines = ("--save=/home/me/c", "--load /home/me/c", "--output-dir '/scratch/my own/o'", "'$X(.*)$'")
    assert all(line in shown for line in lines)


def test_engines_on_nodes_of_another_kind(recipe, capsys):
    """SLURM gives options and #SBATCH lines of the first component to the second one, but not these."""
    more = "--nodes 1 --sbatch account=rl constraint=h100 --engine-nodes 4 --engine-gpus-per-node 4".split()
    assert submit(recipe, "--dry-run", *more, "--engine-sbatch", "constraint=l40s", "exclusive=user") == 0
    shown = capsys.readouterr().out
    trainer, engines = components(shown)
    assert {"nodes": "1", "gpus-per-node": "8", "constraint": "h100"}.items() <= trainer.items()
    assert engines == {
        "ntasks-per-node": "1", "gpus-per-node": "4", "exclusive": "user", "mem": "0", "nodes": "4",
        "constraint": "l40s",
    }  # fmt: skip
    assert shown.splitlines()[-1] == (
        "checked: 8 trainer ranks use 8 of 8 GPUs, 8 engines of 2 GPUs use 16 of 16 on nodes of their own"
    )


@pytest.mark.parametrize("gpu", ["h100", "other"])
def test_gpus_of_engines_that_fit(recipe, gpu):
    """With those of the tests of refusals they do not."""
    flags = f"--engine-nodes 9 --engine-gpu {gpu} --sglang-mem-fraction-static 0.2"
    assert submit(recipe, "--dry-run", *flags.split()) == 0


@pytest.mark.long
def test_engines_on_other_nodes_without_gpus(recipe, capsys):
    assert submit(recipe, "--dry-run", "--engine-nodes", "1", "--gpus-per-node", "0") == 0
    shown = capsys.readouterr().out
    assert len(components(shown)) == 2 and "gpus-per-node" not in shown
    assert shown.splitlines()[-1].endswith("8 engines of 2 GPUs, none of them on a GPU")


def test_a_container(recipe, capsys):
    flags = "--dry-run --container x.sif --container-runtime apptainer --mounts /data /models".split()
    assert submit(recipe, *flags) == 0
    shown = capsys.readouterr().out
    words = words_of(shown)
    assert "VESPO_CONTAINER=x.sif" in words and "VESPO_CONTAINER_RUNTIME=apptainer" in words
    [mounts] = [word for word in words if word.startswith("VESPO_MOUNTS=")]
    assert mounts.endswith(",/data,/models") and str(SCRIPT.parents[1]) in mounts
    assert "VESPO_VENV" not in shown


def test_a_long_deadline_is_asked_for_earlier(recipe, capsys):
    assert submit(recipe, "--dry-run", "--preemption-deadline", "1500") == 0
    assert components(capsys.readouterr().out)[0]["signal"] == "B:USR1@1560"


# what only Megatron's model finds
NONSENSE = "--recompute-granularity selective --recompute-modules nonsense"


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nodes 2", "24 GPUs are needed, 2 nodes x 8 = 16 are there: --nodes 3 or --rollout-engines 4"),
        ("--nodes 1 --gpus-per-node 4 --engine-nodes 9", "--nodes 1 x --gpus-per-node 4 = 4"),
        ("--engine-nodes 1", "--engine-nodes 1 x --engine-gpus-per-node 8 hold 4 of them"),
        ("--engine-nodes 9 --engine-gpus-per-node 1", "x --engine-gpus-per-node 1 hold 0 of them"),
        ("--engine-nodes 9 --engine-gpu a100-40gb --sglang-mem-fraction-static 0.2", "a100-40gb: an engine"),
        ("--engine-nodes 9 --engine-gpu other --gpu a100-40gb", "--engine-gpu other: trainer headroom is -"),
        ("--engine-nodes 0", "--engine-nodes 0: must be at least 1"),
        ("--engine-sbatch x=y", "--engine-gpu and --engine-sbatch are for --engine-nodes N"),
        ("--engine-nodes 2 --colocate", "--colocate puts engines on the trainer's GPUs: leave it or"),
        ("--load other", "must be one folder: a job that is started again goes on there"),
        ("--ray-address auto", "--ray-address is the job script's to say: leave it out"),
        ("--nodes 8 --gpus-per-node 3 --trainer-ranks 4 --rollout-engines 9", "8 nodes x 3 hold 8 engines"),
        ("--gpu a100-40gb", "does not fit --gpu a100-40gb: trainer headroom is -"),
        ("--sglang-mem-fraction-static 0.05", "--gpu h100: an engine holds keys and values of 0 "),
        (NONSENSE, "Megatron cannot build this model on 8 ranks: Invalid choices for recompute_modules"),
        (f"{NONSENSE} --gpus-per-node 0", "Megatron cannot build this model on 8 ranks: "),
        (f"{NONSENSE} --gpu other", "Megatron cannot build this model on 8 ranks: "),
        ("--train-iters 9", "--train-iters 9 optimizer steps must be a multiple of --steps-per-rollout 8"),
        ("--chain 0", "--chain 0: must be 1, or the number of jobs"),
        ("--sbatch signal=USR1@600", "the script's own form is B:USR1@SECONDS"),
        ("--time 10:00", "--time 10:00: 600 seconds, must be longer than the 600 before its end at which"),
        ("--time 10:01 --preemption-deadline 1500", "601 seconds, must be longer than the 1560"),
        ("--sbatch time=5", "--time 5: 300 seconds, must be longer than the 600"),
        ("--time soon", "--time 'soon': must be MINUTES, [HOURS:]MINUTES:SECONDS or DAYS-HOURS["),
        ("--smoke --time 1:2:3:4", "--time '1:2:3:4': must be MINUTES"),
        ("--nodes 0", "--nodes is 0, must be positive"),
        ("--nodes 0 --smoke", "--nodes is 0, must be positive"),
        ("--gpus-per-node -1", "--gpus-per-node is -1, must be positive, or 0"),
        ("--sbatch --partition=h100", "--sbatch --partition=h100: without dashes, as in --sbatch partition="),
        ("--engine-nodes 1 --engine-sbatch --x", "--engine-sbatch --x: without dashes"),
        ("--partition h100", "--partition is an option of sbatch: megatron-vespo submit hands it on"),
        ("--save $NOT_THERE/c --load $NOT_THERE/c", "$NOT_THERE/c: the variable NOT_THERE is not set"),
        ("--sbatch signal=B:USR1@100", "leaves 100 seconds, --preemption-deadline 300 and the end need 360"),
    ],
)  # fmt: skip
def test_what_would_only_show_when_the_job_runs(recipe, capsys, flags, message):
    # the other folder has a checkpoint
    (recipe.parent / "other").mkdir()
    (recipe.parent / "other/latest_checkpointed_iteration.txt").write_text("8")
    flags = flags.replace("--load other", f"--load {recipe.parent / 'other'}")
    assert submit(recipe, "--dry-run", *flags.split()) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_job_may_go_back_to_another_folders_checkpoint(recipe, capsys):
    step = recipe.parent / "other/iter_0000008"
    step.mkdir(parents=True)
    (step / "metadata.json").touch()
    assert submit(recipe, "--dry-run", "--load", str(step)) == 0
    assert submit(recipe, "--dry-run", "--load", str(step.parent), "--ckpt-step", "8") == 0
    assert submit(recipe, "--dry-run", "--load", str(step.parent), "--ckpt-step", "9") == 2
    assert "no checkpoint of that step" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--nodes 0", "--time soon", "--time 10:00"])
def test_a_job_that_sbatch_would_refuse_is_not_shown(recipe, capsys, flags):
    assert submit(recipe, "--dry-run", *flags.split()) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("10:30", 630), ("1:02:03", 3723), ("2-12", 216000), ("1-0:30", 88200),
        ("1-01:00:05", 90005), ("100:00:00", 360000), ("0", math.inf), ("UNLIMITED", math.inf),
    ],
)  # fmt: skip
def test_a_time_limit_as_sbatch_takes_it(text, seconds):
    assert time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "-5", "1:2:3:4", "1-", "1-2:3:4:5", "1 day", "1.5"])
def test_no_time_limit(text):
    with pytest.raises(ValueError, match="^--time .*: must be MINUTES"):
        time_limit(text)


@pytest.mark.long
def test_gpus_that_no_plan_knows(recipe, capsys):
    """Flags are still checked, memory is not."""
    huge = "--max-tokens-per-gpu 16384 --gpu".split()
    assert submit(recipe, "--dry-run", *huge, "h100") == 2
    assert "does not fit --gpu h100: trainer headroom is -" in capsys.readouterr().err
    assert submit(recipe, "--dry-run", *huge, "other") == 0


def test_without_sbatch(recipe, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit(recipe) == 1
    assert capsys.readouterr().err == (
        "megatron-vespo: sbatch is not on PATH: submit where the cluster's jobs are submitted\n"
    )


@pytest.mark.long
def test_a_dry_run_asks_sbatch_where_there_is_one(recipe, sbatch, capsys):
    scontrol, program = sbatch / "scontrol", sbatch / "sbatch"
    scontrol.write_text("#!/bin/bash\n[[ $1 == ping ]]\n")
    scontrol.chmod(0o755)
    program.write_text(
        "#!/bin/bash\n[[ $1 == --test-only && $* != *nowhere* ]] || { echo no such; exit 1; } >&2\n"
    )
    assert submit(recipe, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sbatch would take it"
    assert submit(recipe, "--dry-run", "--sbatch", "partition=nowhere") == 2
    assert capsys.readouterr().err == "megatron-vespo: sbatch would refuse the job: no such\n"
    scontrol.write_text("#!/bin/bash\nexit 1\n")
    assert submit(recipe, "--dry-run", "--sbatch", "partition=nowhere") == 0, "no SLURM answers"


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """An sbatch that keeps what it gets and counts from 7; the folder where it does."""
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/bash\ncd "${0%/*}"; n=$((7 + $(ls | grep -c job)))\n'
        "[[ $n != 9 ]] || { echo full >&2; exit 1; }\n"
        'printf "%s\\n" "$@" >job$n; echo "$n;cluster"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program.parent


def test_it_is_queued(recipe, sbatch, capsys):
    assert submit(recipe) == 0
    told = capsys.readouterr().out
    assert told.endswith("\njob 7\n")
    assert words_of(told)[1:] == (sbatch / "job7").read_text().splitlines()


@pytest.mark.long
def test_a_chain_goes_on_where_a_job_has_not_finished(recipe, sbatch, capsys):
    assert submit(recipe, "--chain", "2") == 0
    assert capsys.readouterr().out.endswith("\njob 7\njob 8, begins if 7 does not finish the run\n")
    first, second = ((sbatch / f"job{n}").read_text().splitlines() for n in (7, 8))
    assert second == ["--dependency=afternotok:7", "--kill-on-invalid-dep=yes", *first]
    assert "--no-requeue" in first and "VESPO_MAX_RESTARTS=0" in first


def test_a_refused_job_says_what_is_queued_already(recipe, sbatch, capsys):
    assert submit(recipe, "--chain", "3") == 1
    assert "sbatch refuses the job: full (in the queue already: job 7, job 8" in capsys.readouterr().err
