# Shared by the sbatch scripts of this folder: where the code is, and how one command starts on all nodes of the job.
# Sourced; the working directory stays that of the submission, so relative paths mean what they meant there. Sets the
# variables of site.sh and of requeue.sh, and:
#   REPO               the checkout that the job runs
#   on_this_node SCRIPT …  the command right here, without a job step
#   start_ranks SCRIPT …  one torchrun per node (launcher/node.py), a rank per GPU, as a job step; returns its exit code
#   on_one_node SCRIPT …  the command on the first node alone
#   pass_signals_on    from here on SIGUSR1 and SIGTERM ask the ranks to save; ASKED is the last one's name

# sbatch runs a copy of the script, so the script's own path says nothing: submit.py sets STAR_REPO, and by hand a job
# is submitted from the checkout.
REPO=${STAR_REPO:-$SLURM_SUBMIT_DIR}
if [[ ! -f $REPO/launcher/train.py ]]; then
    echo "error: no star-dist checkout at $REPO; submit from the checkout, or set STAR_REPO" >&2
    exit 2
fi
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
source "$REPO/launcher/slurm/read_site.sh"
source "$REPO/launcher/slurm/requeue.sh"

NUM_NODES=${SLURM_JOB_NUM_NODES:-1}
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The address by which Slurm itself reaches the node, which is right where names resolve differently inside and outside.
HEAD_ADDRESS=$(patiently scontrol --oneliner show node "$HEAD_NODE" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
if [[ -z $HEAD_ADDRESS ]]; then
    echo "error: Slurm does not say at which address node $HEAD_NODE is; submit the job again" >&2
    exit 69
fi
# Jobs that share a node begin to look at different ports, all below those that Linux gives to outgoing connections.
if [[ -z ${HEAD_PORT:-} ]]; then
    HEAD_PORT=$((20000 + SLURM_JOB_ID % 12000))
    while (exec 3<> "/dev/tcp/$HEAD_ADDRESS/$HEAD_PORT") 2> /dev/null; do
        HEAD_PORT=$((HEAD_PORT + 1))
    done
fi
RANKS=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

STEP_PID=
start_ranks() {
    # --kill-on-bad-exit: without it the other nodes would wait for the lost one until a collective times out.
    # --cpu-bind=none: the one task of a node holds all its ranks, and may use all CPUs that the job has there.
    srun --kill-on-bad-exit=1 --cpu-bind=none --ntasks="$NUM_NODES" --ntasks-per-node=1 --export=ALL \
        ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} \
        "$PYTHON" "$REPO/launcher/node.py" --nnodes="$NUM_NODES" --nproc-per-node="$RANKS" \
        --master-addr="$HEAD_ADDRESS" --master-port="$HEAD_PORT" "$REPO/$1" "${@:2}" &
    STEP_PID=$!
    wait_for_step
}

# `wait` returns as soon as a trapped signal arrives; traps set SIGNALLED, and the step is waited for again.
SIGNALLED=
wait_for_step() {
    local code
    while true; do
        SIGNALLED=
        wait "$STEP_PID"
        code=$?
        if [[ -z $SIGNALLED ]]; then
            STEP_PID=
            return "$code"
        fi
    done
}

# Ten minutes before the time limit Slurm signals the job's shell alone. srun passes the signal on to launcher/node.py of
# every node, and that to its ranks, which save and exit with 75.
ASKED= # stays: whatever the signal found, this job was asked to end and wants to come back
pass_signals_on() {
    trap 'ask_to_save SIGUSR1' USR1
    trap 'ask_to_save SIGTERM' TERM
}

ask_to_save() {
    SIGNALLED=$1
    ASKED=$1
    if [[ -n $STEP_PID ]]; then
        echo "$(date -Is) $1: asking the ranks to save" >&2
        kill -USR1 "$STEP_PID"
    fi
}

on_this_node() {
    ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$PYTHON" "$REPO/$1" "${@:2}"
}

on_one_node() {
    srun --cpu-bind=none --nodes=1 --ntasks=1 --nodelist="$HEAD_NODE" --export=ALL \
        ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$PYTHON" "$REPO/$1" "${@:2}"
}
