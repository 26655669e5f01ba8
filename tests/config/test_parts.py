"""Each number of the settings has bounds."""

import dataclasses

from mocov3_ds.config.run_config import Config


def test_each_number_has_bounds_but_the_free_ones() -> None:
    """A new setting gets its bounds beside the field, or its name here."""

    def without_bounds(kind: object, prefix: str = "") -> set[str]:
        names = set()
        for entry in dataclasses.fields(kind):
            value = getattr(kind, entry.name)
            if dataclasses.is_dataclass(value):
                names |= without_bounds(value, f"{prefix}{entry.name}.")
            elif type(value) in (int, float) and not hasattr(entry.type, "__metadata__"):
                names.add(prefix + entry.name)
        return names

    free = {"data.cache_gb", "views.crop_min", "views.crop_max", "knn.temperature"}
    assert without_bounds(Config()) == free | {"warmup_epochs"}  # up to `epochs`
