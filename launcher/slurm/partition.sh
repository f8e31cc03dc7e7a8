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

# Runs a command of data preparation on the task's share; it loses a chunk at most, however it is killed.
start_on_partition() {
    run_or_requeue ${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"} "$PYTHON" -m "$1" --config "$CONFIG" \
        --partition "$PARTITION" ${WORKERS[@]+"${WORKERS[@]}"} ${OVERRIDES[@]+"${OVERRIDES[@]}"}
}
