"""Each key of a DeepSpeed JSON: typed, refused in a sentence, or left out where it asks nothing."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mocov3_ds.distributed import engine_keys
from mocov3_ds.distributed.engine_keys import READERS, drop_idle_keys, read_settings


def nested(name: str, value: Any) -> dict[str, Any]:
    """A JSON that gives one key, by its dotted name, a value."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def value_of(tree: dict[str, Any], name: str) -> Any:
    for key in name.split("."):
        tree = tree[key]
    return tree


@pytest.mark.parametrize(
    ("name", "given", "typed"),
    [
        ("bf16.enabled", "False", False),
        ("bf16.enabled", "true", True),
        ("bf16.enabled", 0, False),
        ("gradient_clipping", "1.0", 1.0),
        ("gradient_clipping", 1, 1.0),
        ("zero_optimization.stage", "2", 2),
        ("zero_optimization.stage", 2.0, 2),
        ("zero_optimization.reduce_bucket_size", 5e8, 500_000_000),
        ("zero_optimization.reduce_bucket_size", "5e8", 500_000_000),
        ("zero_optimization.offload_optimizer.device", "CPU", "cpu"),
        ("communication_data_type", "FP32", "fp32"),
        ("fp16.loss_scale", "0", 0.0),
        ("optimizer.params.lr", "1e-4", 1e-4),
        ("optimizer.params.betas", ["0.9", 0.999], [0.9, 0.999]),
        ("optimizer.params.adam_w_mode", "True", True),
    ],
)
def test_what_can_mean_one_thing_is_read(name: str, given: Any, typed: Any) -> None:
    read = value_of(read_settings(nested(name, given)), name)
    assert read == typed
    assert type(read) is type(typed)


@pytest.mark.parametrize("name", READERS)
def test_no_key_takes_what_is_not_of_its_kind(name: str) -> None:
    """A text, a list, an object, a number that is none, an infinite one, null and "auto"."""
    for value in ("sometimes", [[1]], {"a": 1}, float("nan"), float("inf"), -7, 10**400, True, ""):
        try:
            value_of(read_settings(nested(name, value)), name)
        except ValueError as refused:
            assert name in str(refused)
            assert "\n" not in str(refused)
        else:
            takes_texts = ("path", "file", "log_level", "device")
            assert isinstance(value, bool) or name.endswith(takes_texts), (name, value)
    for value in (None, "auto"):
        try:
            read = read_settings(nested(name, value))
        except ValueError as refused:
            assert ("null" if value is None else '"auto"') in str(refused)
        else:  # it counts as left out
            with pytest.raises(KeyError):
                value_of(read, name)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled is "auto" where it must be true or false'),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled is "yes"; it must be true or false'),
        ({"bf16": {"enabled": 2}}, "bf16.enabled is 2; it must be true or false"),
        ({"bf16": {"enable": True}}, "unknown key 'enable' in bf16 (did you mean enabled?)"),
        ({"bf16": None}, 'bf16 is null where it must be an object such as {"enabled": true}'),
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["Linear"]}},
            "a list of classes such as torch.nn.Linear",
        ),
        ({"zero_optimization": {"leaf_module": {"classes": ["Block"]}}}, "has no effect here"),
        ({"stage": 2}, "unknown key 'stage' (did you mean zero_optimization.stage?)"),
        ({"gradient_clipping": None}, "gradient_clipping is null where it must be a number of 0"),
        ({"gradient_clipping": True}, "gradient_clipping is true; it must be a number"),
        (
            {"gradient_clipping": float("inf")},
            "is Infinity; it must be a finite number of 0 or more",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": 10**30}},
            "a whole number 1 to 4.6116860",
        ),
        ({"": 1}, "has an unknown key ''"),
        ({"": {"stage": 1}}, "has an unknown key ''"),
        ({"zero_optimization": {"stage": True}}, "stage is true; it must be a whole number 0 to 3"),
        ({"log_level": "inof"}, 'log_level is "inof"; it must be one of debug, info'),
        ({"optimizer": {"params": {"lr": "auto"}}}, 'optimizer.params.lr is "auto"'),
        ({"wandb": {"enabled": "true"}}, "'wandb' has no effect here; use --log wandb"),
        ({"tensorboard": {"enabled": True}}, "would get the learning rate alone"),
        (
            {"steps_per_print": 10},
            "'steps_per_print' has no effect here; it prints where",
        ),
        ({"dump_state": True, "log_level": "error"}, "'dump_state' has no effect here"),
        ({"compile": {"deepcompile": True}}, "use --compile_blocks"),
        ({"managed_gradient_accumulation": False}, "has no effect here"),
        ({"gradient_allreduce_op": "sum"}, "'gradient_allreduce_op' has no effect here"),
        (
            {"zero_optimization": {"max_reuse_distance": 1, "stage3_max_reuse_distance": 1}},
            "stage3_max_reuse_distance twice",
        ),
        ({"zero_optimization.stage": 2}, "unknown key 'zero_optimization.stage' (did you mean"),
        ({"a\x1b[8m": 1}, "unknown key 'a\\x1b[8m'"),
    ],
)
def test_refused_in_one_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        read_settings(given)
    assert "\n" not in str(refused.value)


def test_what_is_switched_off_is_left_out() -> None:
    off = {
        "wandb": {"enabled": "false", "project": "x"},
        "compile": {"deepcompile": False},
        "checkpoint": {},
        "steps_per_print": None,
        "dump_state": False,
        "gradient_allreduce_op": "mean",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"cpu_offload": False, "allgather_bucket_size": "auto"},
        "train_batch_size": "auto",
    }
    assert read_settings(off) == {"zero_optimization": {}}
    spoken = {"steps_per_print": 5, "log_level": "info", "dump_state": True}
    assert read_settings(spoken) == spoken


def test_reading_twice_changes_nothing_and_leaves_the_given_object() -> None:
    given = {"zero_optimization": {"stage": "1", "max_reuse_distance": "auto"}, "fp16": {}}
    before = json.dumps(given)
    once = read_settings(given)
    assert read_settings(once) == once
    assert json.dumps(given) == before


def test_the_json_of_an_earlier_run_is_still_read() -> None:
    """Keys that were taken before and did nothing go; what decides a number stays."""
    earlier = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1, "cpu_offload": True, "overlap_comm": False},
        "steps_per_print": 100,
        "wandb": {"enabled": True, "project": "x"},
        "gradient_clipping": 3.0,
    }
    assert read_settings(drop_idle_keys(earlier)) == {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "gradient_clipping": 3.0,
    }


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


@given(
    name=st.sampled_from([*READERS, *engine_keys._REFUSED, "optimizer.params.lr"]), value=ANY_JSON
)
@settings(max_examples=300, deadline=None)
def test_anything_is_read_or_refused_in_one_sentence(name: str, value: Any) -> None:
    try:
        typed = read_settings(nested(name, value))
    except ValueError as refused:
        assert len(str(refused).splitlines()) == 1
        assert len(str(refused)) < 500
    else:
        assert read_settings(typed) == typed


def test_every_key_of_deepspeeds_own_schema_is_known() -> None:
    """Of the blocks that DeepSpeed describes by fields, none is missing from our list."""
    zero = importlib.import_module("deepspeed.runtime.zero.config")
    offload = importlib.import_module("deepspeed.runtime.zero.offload_config")
    precision = importlib.import_module("deepspeed.runtime.precision_config")
    blocks = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "fp16": precision.DeepSpeedFP16Config,
        "bf16": precision.DeepSpeedBF16Config,
    }
    for block, model in blocks.items():
        for field, info in model.model_fields.items():
            for name in {field, info.alias or field}:
                assert name in engine_keys._inner_keys(block), f"{block}.{name}"


def test_the_table_for_users_names_every_key() -> None:
    table = (Path(__file__).parents[2] / "ds_configs" / "README.md").read_text()
    for name in (*READERS, *engine_keys._REFUSED, *engine_keys._NEED_INFO, *engine_keys._HARMLESS):
        assert f"`{name.rpartition('.')[2]}`" in table, name
