# Everything that differs from cluster to cluster, for all jobs of launcher/slurm and for launcher/submit.py.
# Copy it, fill it in, and point STAR_SITE to the copy (export STAR_SITE=/home/me/site.sh); or edit it in place.
# It is read twice: before `sbatch` (the SBATCH_ variables are sbatch's own way to take options from the environment;
# jobs submitted by hand want `source launcher/slurm/site.sh` first), and inside the job.

# ------------------------------------------------------------------------------------------------ what a job asks for

# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my-project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_CONSTRAINT=h100
# export SBATCH_GPUS_PER_NODE=8
# export SBATCH_MEM_PER_NODE=0            # 0: all of the node
# export SBATCH_EXCLUSIVE=exclusive

# Processes per node: one per GPU. Empty: as many as the job has GPUs on the node.
RANKS_PER_NODE=${RANKS_PER_NODE:-}

# -------------------------------------------------------------------------------------------------------- environment

# How a node gets Python with star-dist in it.
# module load cuda/12.6
# source /path/to/star-dist/.venv/bin/activate
PYTHON=${PYTHON:-python}

# What stands before every command on a node, for clusters with containers; an array.
# IN_CONTAINER=(apptainer exec --nv --bind /data,/scratch /images/star-dist.sif)
IN_CONTAINER=(${IN_CONTAINER[@]+"${IN_CONTAINER[@]}"})

# Network interface of NCCL and gloo where the default is not the fast one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# Where downloads, loader caches and parts of S3 checkpoints lie for a while: a disk of the node.
# export TMPDIR=/scratch/local

# S3: credentials from the usual places (~/.aws, AWS_PROFILE, an instance's role); an endpoint for other stores.
# export S3_ENDPOINT_URL=https://s3.example.org

# ---------------------------------------------------------------------------------------------------------- behaviour

# Seconds that torchrun leaves to ranks between SIGTERM and SIGKILL; no longer than the cluster's KillWait.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-30}

# Attempts in a row without a new checkpoint after which a failing job is not tried again.
# For a job of data preparation or a tokenizer's training: restarts in all after which it is not requeued when it cannot
# reach its storage.
MAX_FAILURES=${MAX_FAILURES:-3}

# Check the nodes (launcher/preflight.py) before the first start of a training and after every failure: yes or no.
PREFLIGHT=${PREFLIGHT:-yes}
