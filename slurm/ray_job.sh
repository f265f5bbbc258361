# shellcheck shell=bash disable=SC2154 # environment.sh sets step, enter, root
# Sourced by train.sbatch, smoke.sbatch and eval.sbatch: a command with Ray on all nodes, and what its exit code means.

# What is this job's: `on_all`, the options of a step with one task on each of its nodes. Of a heterogeneous job's two
# components the first one's nodes are the trainer's, VESPO_TRAINER_NODES, and the second one's the engines'.
look_at_allocation() {
    nodelist=$SLURM_JOB_NODELIST
    export VESPO_NODES=$SLURM_NNODES VESPO_TRAINER_NODES=''
    on_all=(--nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
    [[ ${SLURM_HET_SIZE:-1} != 1 ]] || return 0
    [[ $SLURM_HET_SIZE == 2 ]] || die "a job of $SLURM_HET_SIZE components: must be two, the trainer's and the engines'"
    VESPO_TRAINER_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0" | tr '\n' ' ')
    nodelist="$SLURM_JOB_NODELIST_HET_GROUP_0 for the trainer, $SLURM_JOB_NODELIST_HET_GROUP_1 for engines"
    VESPO_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0,$SLURM_JOB_NODELIST_HET_GROUP_1" | wc -l)
    # each component's own numbers count; not every MPI of SLURM's knows such steps
    on_all=("--het-group=0,1" --ntasks-per-node=1 --mpi=none)
}

# The command runs on the first node; returns its exit code. SIGUSR1 for this shell is passed to it.
run_with_ray() {
    local first code
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # of the first component, if there are two
    VESPO_FIRST_NODE=$(address_of "$first") || exit 1
    VESPO_RAY_PORT=${VESPO_RAY_PORT:-$(free_port "$VESPO_FIRST_NODE")} || exit 1
    export VESPO_FIRST_NODE
    # who is not of this job does not get into its Ray
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
    RAY_AUTH_TOKEN=$(od -An -vtx1 -N32 /dev/urandom | tr -d ' \n')
    say "attempt $((restarts + 1)): $VESPO_NODES nodes ($nodelist), Ray's logs in $VESPO_LOGS"
    local exit_code=$VESPO_LOGS/exit-code
    rm -f "$exit_code"
    # --wait: the first task to end is the first node's; the others follow by themselves, or are killed, and then
    # srun's exit code is theirs. The command is one word: srun takes a lone colon among its words for its own.
    "${step[@]}" "${on_all[@]}" --kill-on-bad-exit=0 --wait=60 "${enter[@]}" \
        bash "$root/slurm/ray_node.sh" "$(printf '%q ' "$@")" &
    local started=$!
    trap 'asked=1; say "SIGUSR1: the run is to save and end"; kill -USR2 "$started" || true' USR1
    # signals are heard between the sleeps: a `wait` that one interrupts can hang
    while kill -0 "$started" 2>/dev/null; do sleep 1 || true; done
    code=0
    wait "$started" || code=$?
    trap '' USR1
    if [[ -s $exit_code ]]; then code=$(<"$exit_code"); fi
    # so early that no task could hear it: nothing has begun
    if [[ $asked ]] && ((code == 128 + 12)); then code=75; fi
    return "$code"
}

# IPv4 address of a node, as the others reach it.
address_of() {
    local name address
    name=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    address=$(getent ahostsv4 "$name" | awk '$1 !~ /^127\./ {print $1; exit}')
    # /etc/hosts may call this very node 127.0.1.1
    if [[ -z $address && $1 == "${SLURMD_NODENAME:-}" ]]; then address=$(hostname -I | awk '{print $1}'); fi
    [[ $address ]] || die "node $1 has no address that others could reach"
    echo "$address"
}

# One that nobody listens at, of an address of this machine: a job's script runs on its first node. Neither Linux nor
# Ray gives ports of this range away by itself.
free_port() {
    local port tries
    for ((tries = 0; tries < 100; tries++)); do
        port=$((20000 + RANDOM % 10000))
        if ! (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    die "no free port at $1"
}

# A node that is lost ends the run before SLURM has noticed: does each still start a task?
nodes_answer() {
    timeout --kill-after=10 120 srun --overlap --input=none --export=ALL "${on_all[@]}" true
}

# Ends the job by the program's exit code: 75 means saved, and that the same command goes on from there.
end_job() {
    local code=$1 why
    case $code in
        0) exit 0 ;;
        75) why="all is saved" ;;
        76) # without a signal from here somebody else has ended the run
            [[ $asked ]] || { say "exit code $code"; exit "$code"; }
            why="not saved in time, the last checkpoint counts (--preemption-deadline, --signal)"
            ;;
        2 | 130)
            say "exit code $code"
            exit "$code"
            ;;
        *)
            if nodes_answer; then
                say "exit code $code, all nodes answer: not started again"
                exit "$code"
            fi
            why="a node does not answer"
            ;;
    esac
    if ! scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
        say "$why; the job was cancelled"
    elif ((restarts >= VESPO_MAX_RESTARTS)); then
        say "$why; started again $restarts times (VESPO_MAX_RESTARTS), not once more: submit the job anew to go on"
    else
        say "$why: back into the queue" # before SLURM ends this shell for it
        if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
        say "SLURM does not let the job back: submit it anew to go on"
    fi
    exit "$code"
}

asked= # SLURM's signal that the time is up has come
restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts > VESPO_MAX_RESTARTS)); then
    die "started again $restarts times, more than VESPO_MAX_RESTARTS $VESPO_MAX_RESTARTS"
fi
look_at_allocation
