#!/usr/bin/env bash
# NODE_RANK=0 ./train.sh         on each node, NODE_RANK from 0 to @{last_node}; node 0 is @{first_host}
#
# To stop in good order, signal the ranks of one node; all nodes save and leave:
#     pkill -USR1 -f '[-]m mocov3_ds[.]train'
# SIGTERM to a torchrun reaches its ranks as well, but the torchrun of the other nodes then wait five
# minutes for the one that has gone.
set -eu
# shellcheck disable=SC1091
source @{folder}/environment.sh
exec torchrun --nnodes @{nodes} --nproc-per-node @{ranks} --node-rank "${NODE_RANK:?which node}" \
    --master-addr @{first_host} --master-port "${MASTER_PORT:-29500}" \
    --shutdown-timeout 600 -m @{module_train}
