#!/usr/bin/env bash
# ./train.sh                     start on all hosts of the hostfile, from one of them
#
# Needs pdsh here, ssh without a password to each host, and the same Python environment and folder
# at the same place on all of them. To stop in good order, signal the ranks, not this script:
#     pdsh -R ssh -w @{host_list} "pkill -USR1 -f '[-]m mocov3_ds[.]train'"
set -eu
# shellcheck disable=SC1091
source @{folder}/environment.sh
# What the ranks on all hosts shall see of it. It travels on command lines that others can read, so
# keys of object storage are not among it: they belong into ~/.aws or the like on each host.
export DS_ENV_FILE=@{folder}/deepspeed_env
env | grep -E '^(OMP_NUM_THREADS|PYTHONUNBUFFERED|NCCL_|GLOO_)' > "$DS_ENV_FILE"
exec deepspeed --hostfile @{folder}/hostfile --launcher pdsh \
    --master_addr @{first_host} --master_port 29500 --module @{module_train}
