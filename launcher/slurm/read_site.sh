# Reads what differs from cluster to cluster: the file that STAR_SITE names, or else the site.sh beside this one, if it
# is there. Sourced by the jobs of this folder and by submit.sh of run folders.
SITE=${STAR_SITE:-${BASH_SOURCE[0]%/*}/site.sh}
if [[ -f $SITE ]]; then
    # With a plain shell's options, as what modules and environments run for it expects them; what it sets ends with it:
    # under -e a job would end where it wants to look at an exit code.
    SHELL_OPTIONS=$-
    set +euo pipefail
    source "$SITE" || true # its last line may be a condition; and one that sets -e does not end the job by it
    set +euo pipefail
    [[ $SHELL_OPTIONS != *e* ]] || set -e
    [[ $SHELL_OPTIONS != *u* ]] || set -u
elif [[ -n ${STAR_SITE:-} ]]; then
    echo "error: STAR_SITE is $STAR_SITE, which is no file; copy launcher/slurm/site.sh there and fill it in" >&2
    exit 2
fi
# For a file that leaves them out.
PYTHON=${PYTHON:-python} MAX_FAILURES=${MAX_FAILURES:-3} PREFLIGHT=${PREFLIGHT:-yes}
