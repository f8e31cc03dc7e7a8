# Reads what differs from cluster to cluster: the file that STAR_SITE names, or else the site.sh beside this one, if it
# is there. Sourced by the jobs of this folder.
SITE=${STAR_SITE:-${BASH_SOURCE[0]%/*}/site.sh}
if [[ -f $SITE ]]; then
    source "$SITE"
elif [[ -n ${STAR_SITE:-} ]]; then
    echo "error: STAR_SITE is $STAR_SITE, which is no file; copy launcher/slurm/site.sh there and fill it in" >&2
    exit 2
fi
