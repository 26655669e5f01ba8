"""What ranks have imported when they begin, in the process that they are forked from."""

import gc

# the first engine imports it, and with it torch's compiler
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import mocov3_ds.train  # noqa: F401

gc.freeze()  # or each collection of each rank walks through all of that, and so copies it
