"""The address of a set that was in memory is no place."""

import pytest

from mocov3_ds.data.sample_source import OWN_SET, check_address


def test_the_address_of_a_set_in_memory_is_refused_elsewhere() -> None:
    check_address("runs/own")
    check_address("s3://bucket/own")
    with pytest.raises(ValueError, match="own://3 was a dataset in the memory of a program"):
        check_address(f"{OWN_SET}3")
