#!/usr/bin/env bash
# NODE_RANK=0 ./train.sh         on each node, NODE_RANK from 0 to @{last_node}; node 0 is @{first_host}
#
# To stop in good order, signal the ranks of one node; all nodes save and leave:
#     pkill -USR1 -f '[-]m mocov3_ds[.]train'
set -eu
# shellcheck disable=SC1091
source @{folder}/environment.sh
exec accelerate launch --config_file @{folder}/accelerate.yaml \
    --machine_rank "${NODE_RANK:?which node}" --main_process_port "${MASTER_PORT:-29500}" \
    -m @{module_train}
