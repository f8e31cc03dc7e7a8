# Shared by the array jobs of data preparation: which share of the work a task takes. Sourced with the script's own
# arguments; the working directory becomes the checkout. Reads the variables of site.sh and sets:
#   CONFIG             the first argument
#   OVERRIDES          the others
#   PARTITION          i/N: the task of the array, and PARTITIONS or the number of tasks
#   WORKERS            --workers with the CPUs of the task, where Slurm tells them

if [[ $# -lt 1 || -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "usage: sbatch --array=0-N launcher/slurm/JOB.sbatch CONFIG [section.key=value …]" >&2
    exit 2
fi
source launcher/slurm/read_site.sh
source launcher/slurm/requeue.sh

if [[ -z ${PARTITIONS:-} ]]; then
    if [[ $SLURM_ARRAY_TASK_MIN -ne 0 || $SLURM_ARRAY_TASK_COUNT -ne $((SLURM_ARRAY_TASK_MAX + 1)) ]]; then
        echo "error: the array is not 0-N (it has $SLURM_ARRAY_TASK_COUNT tasks from $SLURM_ARRAY_TASK_MIN to" \
            "$SLURM_ARRAY_TASK_MAX); set PARTITIONS to the number of all partitions" >&2
        exit 2
    fi
    PARTITIONS=$SLURM_ARRAY_TASK_COUNT
fi
CONFIG=$1
OVERRIDES=("${@:2}")
PARTITION=$SLURM_ARRAY_TASK_ID/$PARTITIONS
WORKERS=(${SLURM_CPUS_PER_TASK:+--workers "$SLURM_CPUS_PER_TASK"})

# Runs a command of data preparation on the task's share and ends with its exit code. What it could not reach (69 of
# star_dist/cli.py) may be there later: the task is requeued then, in all at most MAX_FAILURES times.
# Signals are not passed on: one that ends this shell ends the task, and Slurm then kills what is left of it. The
# command has nothing to do before it ends; it loses a chunk at most, however it is killed.
start_on_partition() {
    local code=0 restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_FAILURES:-3}
    ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "${PYTHON:-python}" -m "$1" --config "$CONFIG" \
        --partition "$PARTITION" ${WORKERS[@]+"${WORKERS[@]}"} ${OVERRIDES[@]+"${OVERRIDES[@]}"} || code=$?
    if [[ $code == 69 && $restarts -lt $most ]]; then
        echo "$(date -Is) exit code 69: requeueing this task (restart $((restarts + 1)) of at most $most)" >&2
        requeue_and_exit "$code"
    fi
    exit "$code"
}
