"""Where are the shards that a run folder names, seen from another working folder?"""

import dataclasses
from pathlib import Path

from mocov3_ds.config.run_config import Config


def anchor_to_run(config: Config, run: Path) -> Config:
    """Settings of a run whose relative paths to shards are found from any working folder.

    Runs of today keep absolute paths; earlier ones kept those that were given, from the folder in
    which `runs` lay. A path that is found from the present folder stays.

    Args:
        config: settings as `from_json` read them.
        run: folder of the run.
    """
    folder_then = config.folder
    origin = run.resolve()
    if folder_then.is_absolute() or origin.parts[-len(folder_then.parts) :] != folder_then.parts:
        return config
    origin = Path(*origin.parts[: -len(folder_then.parts)])

    def anchor_path(url: str) -> str:
        is_relative = url and "://" not in url and not Path(url).is_absolute()
        moved = origin / url
        return str(moved) if is_relative and not Path(url).exists() and moved.exists() else url

    data = dataclasses.replace(
        config.data,
        shards=anchor_path(config.data.shards),
        probe_shards=anchor_path(config.data.probe_shards),
    )
    return dataclasses.replace(config, data=data)
