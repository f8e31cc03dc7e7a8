# How a job, or a task of an array, comes back by itself. Sourced; sets:
#   requeue_and_exit CODE   ends it, or lets Slurm start it again
#   requeue_if_out_of_reach CODE   lets Slurm start it again after a command that ended with CODE
#   run_or_requeue COMMAND …   runs a command; where it fails, ends or comes back
# After read_site.sh.

# What people filter their own lists by would hide this job, and it would not come back.
unset "${!SQUEUE_@}"

# The controller may be busy or restarting: a command is tried for five minutes.
patiently() {
    local tries=0
    until "$@"; do
        if ((++tries == 20)); then
            return 1
        fi
        sleep 15
    done
}

# A job that `scancel` is ending, or that Slurm itself requeues, is no longer RUNNING: it would accept a requeue all the
# same, and a cancelled job would come back.
requeue_and_exit() {
    local state what=job job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then # the number of one task's job stands for the whole array
        what=task job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    if ! state=$(patiently squeue --noheader --jobs="$job" --format=%T); then
        echo "error: Slurm does not say whether this $what is still wanted: not requeued; submit it again" >&2
    elif [[ $state != RUNNING ]]; then
        echo "Slurm is ending this $what itself: not requeued" >&2
    elif patiently scontrol requeue "$job"; then
        sleep 60 # Slurm ends the script on its way
    else
        echo "error: Slurm does not requeue this $what; submit it again" >&2
    fi
    exit "$1"
}

# What ended with an exit code that says that something could not be reached (69 of star_dist/cli.py) may find it later:
# it is requeued, in all at most MAX_FAILURES times. Returns for every other code.
requeue_if_out_of_reach() {
    local restarts=${SLURM_RESTART_COUNT:-0} most=$MAX_FAILURES
    if [[ $1 == 69 && $restarts -lt $most ]]; then
        echo "$(date -Is) exit code 69: requeueing (restart $((restarts + 1)) of at most $most)" >&2
        requeue_and_exit 69
    fi
}

# Runs a command that has nothing to do before it ends, because signals are not passed on: one that ends this shell ends
# the job, and Slurm then kills what is left of it. Returns where it succeeded.
run_or_requeue() {
    local code=0
    "$@" || code=$?
    requeue_if_out_of_reach "$code"
    if [[ $code != 0 ]]; then
        exit "$code"
    fi
}
