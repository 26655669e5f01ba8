# Read by every node before its ranks start. Uncomment what your network needs.
export OMP_NUM_THREADS=@{cores}  # torch's threads of a rank; decode threads beside them: --data.threads
export PYTHONUNBUFFERED=1

# Nodes find each other over the wrong network (a hang at the start, "connection refused"):
# export NCCL_SOCKET_IFNAME=eth0      # the interface that reaches the other nodes; ^docker0 excludes
# export GLOO_SOCKET_IFNAME=eth0      # the same for ranks on CPUs

# InfiniBand or RoCE:
# export NCCL_IB_HCA=mlx5             # which adapters
# export NCCL_IB_DISABLE=1            # there are none, or they do not work: plain TCP

# Slow or failing collectives: what NCCL found and chose, once at the start of a rank
# export NCCL_DEBUG=INFO
# export NCCL_DEBUG_SUBSYS=INIT,NET

# CUDA's allocator grows its segments in place (expandable_segments:True) unless this says otherwise:
# export PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512

# Shards in object storage: AWS_ENDPOINT_URL, AWS_PROFILE and the like, the same on every node
