"""What libraries read again and again, read once: MLflow its seventy migrations whenever it opens a store, to know
which is the last; DVC its files of YAML, params.yaml for each of a stage's sections."""

import pickle
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.script import ScriptDirectory
from ruamel.yaml import YAML

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


def read_yaml_once(*files: Path) -> None:
    """Let each text of YAML be parsed for the first who asks, and those of ``files`` now; all get copies."""
    load, parsed = YAML.load, {}

    def known(yaml: YAML, text: Any) -> Any:
        if yaml.typ != ["safe"] or not isinstance(text, str):
            return load(yaml, text)
        if text not in parsed:
            parsed[text] = pickle.dumps(load(yaml, text))
        return pickle.loads(parsed[text])

    YAML.load = known
    for file in files:
        YAML(typ="safe").load(file.read_text(encoding="utf-8"))
