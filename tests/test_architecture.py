"""The rooms' arrows point one way: which module of the package may import which, as DESIGN says, read from the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "latentloom"

CORE = (
    *(
        "params",
        "params_file",
        "files",
        "layout",
        "errors",
        "stage",
        "devices",
        "randomness",
        "model_files",
        "base_model",
    ),
    *("sharding", "source_code", "sizes", "image_grid", "dvc_outs", "lettering", "tensor_files", "file_hashes", "ids"),
    *("engine", "engine_ray", "engine_worker"),
)
# Readers of what a stage left: what other stage packages may import of it.
READERS = (
    *("ingestion.shards", "ingestion.pngs", "ingestion.rejects"),
    *("encoding.dataset", "encoding.codec", "encoding.vae", "encoding.text_encoder", "encoding.pretrained"),
    *("encoding.row_sources", "encoding.shard_files", "encoding.vision_encoder", "encoding.features"),
    *("encoding.named_encoders", "encoding.references", "encoding.text_embedder"),
)
STAGE_PACKAGES = ("ingestion", "encoding", "validation", "training", "evaluation")
# Room -> what it may import besides itself: rooms and modules, by the beginning of their names.
ALLOWED = {
    "diffusion": (),
    **dict.fromkeys(CORE, ("diffusion", *CORE)),
    **dict.fromkeys(STAGE_PACKAGES, ("diffusion", *CORE, *READERS)),
    "tracking": ("diffusion", *CORE),
    "registry": ("diffusion", *CORE, *READERS, "evaluation", "tracking"),
    "lineage": ("diffusion", *CORE, *READERS, "ingestion.fingerprints", "evaluation", "tracking", "registry"),
    "export": ("diffusion", *CORE, *READERS, "evaluation", "tracking", "registry"),
    "page": ("diffusion", *CORE, *READERS, "ingestion.one_picture", "evaluation", "registry", "lineage"),
    "cli": ("",),
    "pipelines": ("",),
}
# Within the core, those that all others stand on may import less than the table says.
FOUNDATION = {
    "errors": (),
    "randomness": (),
    "ids": (),
    "sharding": ("ids",),
    "engine": ("errors", "engine_ray"),
    "engine_ray": ("errors", "engine", "engine_worker", "files"),
    "engine_worker": ("errors", "engine"),
    "source_code": (),
    "sizes": (),
    "image_grid": ("lettering",),
    "lettering": (),
    "layout": ("errors",),
    "files": ("errors",),
    "devices": ("errors",),
    "params": ("sizes", "diffusion.sampling_settings"),
    "params_file": ("errors", "params", "diffusion.sampling_settings"),
}


def modules() -> list[Path]:
    package = [path for path in PACKAGE.rglob("*.py") if path.read_text(encoding="utf-8").strip()]
    return sorted([*package, *(ROOT / "pipelines").glob("*.py")])


def name_of(file: Path) -> str:
    """``training.loop`` of a module, ``training`` of its package, ``pipelines.train`` of a script."""
    if file.is_relative_to(PACKAGE):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")
    return f"pipelines.{file.stem}"


def imported_by(file: Path) -> set[str]:
    """What a module imports of the package, at its top or inside a function: modules, or names in them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where a name comes from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("latentloom.") for name in found if name.startswith("latentloom.")}


def is_within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") or room == "" for room in rooms)


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_a_module_imports_only_what_its_room_may(file):
    own = name_of(file)
    if not own:
        pytest.skip("the package itself imports nothing that has a room")
    room = own.partition(".")[0]
    allowed = FOUNDATION.get(own, (room, *ALLOWED[room]))
    assert sorted(name for name in imported_by(file) if not is_within(name, allowed)) == []


def test_every_room_is_in_the_table():
    rooms = {name_of(file).partition(".")[0] for file in modules()}
    assert rooms - {""} <= set(ALLOWED)


def test_inside_the_package_a_name_of_the_diffusion_is_imported_from_the_module_that_defines_it():
    """The lazy package is for users: through it, nobody could tell which code a stage runs."""
    files = {path.stem for path in (PACKAGE / "diffusion").glob("*.py")} - {"__init__"}
    for file in modules():
        for name in imported_by(file):
            if name.startswith("diffusion."):
                assert name.split(".")[1] in files, f"{file}: import it from its own module"


@pytest.mark.parametrize(
    ("room", "foreign"),
    [
        ("diffusion", ("mlflow", "dvc", "pandas", "pyarrow", "diffusers", "transformers", "accelerate")),
        ("training", ("mlflow", "dvc", "great_expectations", "diffusers", "transformers")),
        ("evaluation", ("mlflow", "dvc", "great_expectations")),
        ("ingestion", ("torch", "mlflow", "dvc", "great_expectations")),
        ("encoding", ("mlflow", "great_expectations")),
        ("validation", ("mlflow", "dvc")),
    ],
)
def test_a_room_needs_no_library_of_another(room, foreign):
    for file in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] not in foreign, f"{file} imports {name}"
