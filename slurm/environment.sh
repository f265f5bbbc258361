# shellcheck shell=bash disable=SC2034 # enter and step are used where this is sourced
# Sourced by the scripts of this folder: where the program runs, and small words that they share.
#
# Give these as NAME=VALUE before the flags (as megatron-vespo submit does), set them before sbatch, or change the
# defaults here:
#   VESPO_VENV               virtual environment with megatron_vespo
#   VESPO_CONTAINER          image in its place: what pyxis takes (docker://..., FILE.sqsh) or apptainer's FILE.sif
#   VESPO_CONTAINER_RUNTIME  pyxis (srun --container-image) or apptainer
#   VESPO_MOUNTS             folders the container sees, comma-separated: models, data, outputs
#   VESPO_LOGS               Ray's logs, one a node, and this job's marks
#   VESPO_RAY_PORT           of the first node; default: one that is free there
#   VESPO_RAY_OPTIONS        further flags of `ray start`, the same on every node
#   VESPO_START_SECONDS      until Ray runs on all nodes
#   VESPO_MAX_RESTARTS       how often a job goes on after its time limit or a lost node
root=${VESPO_ROOT:-$SLURM_SUBMIT_DIR}
: "${VESPO_VENV:=$root/.venv}"
: "${VESPO_CONTAINER:=}"
: "${VESPO_CONTAINER_RUNTIME:=pyxis}"
: "${VESPO_MOUNTS:=$root,$SLURM_SUBMIT_DIR}"
: "${VESPO_LOGS:=$SLURM_SUBMIT_DIR/slurm-logs/$SLURM_JOB_ID}"
: "${VESPO_RAY_PORT:=}"
: "${VESPO_RAY_OPTIONS:=}"
: "${VESPO_START_SECONDS:=600}"
: "${VESPO_MAX_RESTARTS:=20}"
export VESPO_LOGS VESPO_RAY_PORT VESPO_RAY_OPTIONS VESPO_START_SECONDS

say() { printf '%(%F %T)T %s: %s\n' -1 "$(hostname -s)" "$*" >&2; }

die() {
    say "$@"
    exit 1
}

# srun and what stands before the program: "${step[@]}" srun's options "${enter[@]}" command
# --cpu-bind: a task would have one core where SLURM binds, as its default is one a task. --export: sbatch --export=NONE
# is for this script's environment, a step needs the variables set here.
step=(srun --input=none --cpu-bind=none --export=ALL)
enter=()
if [[ -z $VESPO_CONTAINER ]]; then
    [[ -x $VESPO_VENV/bin/megatron-vespo ]] || die "$VESPO_VENV has no megatron-vespo: set VESPO_VENV or VESPO_CONTAINER"
    export PATH=$VESPO_VENV/bin:$PATH
elif [[ $VESPO_CONTAINER_RUNTIME == pyxis ]]; then
    step+=(--container-image="$VESPO_CONTAINER" --container-workdir="$SLURM_SUBMIT_DIR")
    step+=(--container-mounts="$(sed -E 's/([^,]+)/\1:\1/g' <<<"$VESPO_MOUNTS")")
elif [[ $VESPO_CONTAINER_RUNTIME == apptainer ]]; then
    # its processes are the step's: signals and exit codes come through
    enter=(apptainer exec --nv --pwd "$SLURM_SUBMIT_DIR" --bind "$VESPO_MOUNTS" "$VESPO_CONTAINER")
else
    die "VESPO_CONTAINER_RUNTIME is $VESPO_CONTAINER_RUNTIME, must be pyxis or apptainer"
fi
mkdir -p "$VESPO_LOGS"
