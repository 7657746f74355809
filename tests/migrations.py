"""MLflow reads its seventy migrations whenever it opens a store, to know which is the last: here once per process."""

from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory

_read: dict[str, ScriptDirectory] = {}


def read_migrations_once() -> None:
    """Let each folder of migrations be read by the first who asks, and MLflow's now."""
    if _read:
        return
    read = ScriptDirectory.from_config

    def known(config: Config) -> ScriptDirectory:
        folder = config.get_main_option("script_location")
        if folder not in _read:
            _read[folder] = read(config)
        return _read[folder]

    ScriptDirectory.from_config = known
    import mlflow

    config = Config()
    config.set_main_option("script_location", str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    known(config).get_heads()
