"""What an optimizer says of itself where it overrides nothing."""

import inspect

from mocov3_ds.optim import AdamW, Lamb, Lars
from mocov3_ds.optim.contract import OptimizerContract
from mocov3_ds.optim.kernel_types import NORMS
from mocov3_ds.optim.sharded import ShardedOptimizer
from tests.optim.foreign import SignSgd


def test_defaults() -> None:
    assert SignSgd.bytes_moved() == 12  # w g read, w written, no state
    assert SignSgd.translate_params({"lr": 1}) == {"lr": 1}
    assert SignSgd.count_quantities(None, {}) == NORMS  # type: ignore[arg-type]
    assert SignSgd.counts_own_updates and not SignSgd.accepts_update_clip


def test_what_has_to_be_given() -> None:
    given = {name for name, _ in inspect.getmembers(OptimizerContract, inspect.isfunction)}
    asked = {
        name
        for name in given
        if getattr(getattr(OptimizerContract, name), "__isabstractmethod__", 0)
    }
    assert asked == {"measure_flat", "move_flat"}
    assert issubclass(ShardedOptimizer, OptimizerContract)
    for kind in (Lamb, AdamW, Lars):
        assert all(name in vars(kind) for name in asked)
