#!/usr/bin/env bash
# One task of a job on each of its nodes: Ray; on the first node, when Ray has all, the command too.
#
#     ray_node.sh "COMMAND ..."     quoted for a shell; gets --ray-address ADDRESS appended
#
# Ends with the command's exit code there, and with 0 on the others as soon as the first node has ended.
set -euo pipefail

eval "set -- $1"
first=$VESPO_FIRST_NODE port=$VESPO_RAY_PORT
node=${SLURMD_NODENAME:-$(hostname -s)}
log=$VESPO_LOGS/ray-$node.log
deadline=$((SECONDS + VESPO_START_SECONDS))
ray='' program='' signalled=''

say() { printf '%(%F %T)T %s: %s\n' -1 "$node" "$*" >&2; }

# SIGUSR2 asks the command to save. SLURM sends it to this shell, or to all processes of the step, as its
# ProctrackType says: so all ignore it, and this shell tells the command, once, by SIGUSR1.
# shellcheck disable=SC2317,SC2329 # the trap calls it
ask_to_save() {
    signalled+=x
    if [[ $program ]]; then kill -USR1 "$program" 2>/dev/null || true; fi
}

deaf() {
    trap '' USR2
    exec "$@"
}

# this node's address on the network that the first one is on
own_address() {
    trap '' USR2
    python3 -c 'import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 1)); print(s.getsockname()[0])' "$first"
}

first_answers() { timeout 10 bash -c "exec 3<>/dev/tcp/$first/$port" 2>/dev/null; }

# Where trainer and engines have nodes of their own, Ray knows each by a resource. Its names are those of
# megatron_vespo/cluster/roles.py, and of no other file.
role() {
    [[ $VESPO_TRAINER_NODES ]] || return 0
    case " $VESPO_TRAINER_NODES" in
        *" $node "*) echo '--resources={"vespo_trainer":1}' ;;
        *) echo '--resources={"vespo_engine":1}' ;;
    esac
}

start_ray() {
    local options
    read -ra options <<<"$(role) $VESPO_RAY_OPTIONS"
    deaf ray start --block --node-ip-address="$address" --num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}" \
        --disable-usage-stats "$@" "${options[@]}" </dev/null >>"$log" 2>&1 &
    ray=$!
}

# TERM, ten seconds, KILL
end() {
    [[ $1 ]] || return 0
    kill -TERM "$1" 2>/dev/null || return 0
    local until=$((SECONDS + 10))
    while kill -0 "$1" 2>/dev/null && ((SECONDS < until)); do sleep 0.2; done
    kill -KILL "$1" 2>/dev/null || true
}

fail() {
    say "$@"
    if [[ -f $log ]]; then tail -n 20 "$log" >&2; fi
    end "$ray"
    exit 1
}

run_on_first() {
    start_ray --head --port="$port" --include-dashboard=false
    deaf python3 -m megatron_vespo.cluster.wait_for_nodes "$first:$port" "$VESPO_NODES" "$((deadline - SECONDS))" &
    local waiting=$!
    while kill -0 "$waiting" 2>/dev/null; do
        if ! kill -0 "$ray" 2>/dev/null; then
            end "$waiting"
            fail "Ray has ended"
        fi
        (deaf sleep 0.5)
    done
    wait "$waiting" || fail "Ray does not run on all $VESPO_NODES nodes; see $VESPO_LOGS"
    if [[ $signalled ]]; then return 75; fi # nothing has begun, nothing is to be saved
    deaf "$@" --ray-address "$first:$port" &
    program=$!
    wait_for "$program"
}

# The exit code of a child. Signals are heard between the sleeps: a `wait` that one interrupts can hang.
wait_for() {
    while kill -0 "$1" 2>/dev/null; do (deaf sleep 0.5); done
    wait "$1"
}

run_on_other() {
    trap '' USR2 # here is nothing to save
    until first_answers; do
        ((SECONDS < deadline)) || fail "the first node's Ray at $first:$port does not answer"
        sleep 1
    done
    start_ray --address="$first:$port"
    # later Ray may end here while the run goes on elsewhere; this task ends with the first node's
    local misses=0 begun=$SECONDS
    while ((misses < 3)); do
        sleep 2
        if ((SECONDS < begun + 60)) && ! kill -0 "$ray" 2>/dev/null; then fail "Ray has ended"; fi
        if first_answers; then misses=0; else misses=$((misses + 1)); fi
    done
}

trap ask_to_save USR2
address=$(own_address)
code=0
echo "$(date '+%F %T') attempt $((${SLURM_RESTART_COUNT:-0} + 1))" >>"$log"
if [[ $address == "$first" ]]; then
    run_on_first "$@" || code=$?
    echo "$code" >"$VESPO_LOGS/exit-code"
else
    run_on_other
fi
end "$ray"
exit "$code"
