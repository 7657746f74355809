"""A data set on the Hugging Face hub: its id in a source's ``path``, and the commit which that stands for.

    owner/name             its latest commit
    owner/name@REVISION    that commit, branch or tag

A branch moves on. `find_sources` asks the hub for the commit before each run, and `ingest` reads that one. A token is
that of the environment (``HF_TOKEN``) or of ``hf auth login``.
"""

import re

from latentloom.files import read_json
from latentloom.ingestion.rejects import error_message
from latentloom.ingestion.sources import IngestError
from latentloom.layout import SOURCES
from latentloom.params import WHAT_A_PATH_HOLDS

COMMIT = re.compile(r"[0-9a-f]{40}")
REFERENCE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\S+))?")
HOW_TO_LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


def hub_id(path: str) -> str:
    """The id in a source's path, without the revision.

    Raises:
        IngestError: when it is none.
    """
    return _id_and_revision(path)[0]


def commit_of(path: str) -> str:
    """The commit that a source's path stands for, of 40 hexadecimal digits; the hub is asked unless it names one.

    Raises:
        IngestError: when the path is no id, there is no such data set or revision, or the hub cannot be asked.
    """
    name, revision = _id_and_revision(path)
    if revision and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import httpx

    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except GatedRepoError as error:
        asked = f"ask for access at https://huggingface.co/datasets/{name}, and {HOW_TO_LOG_IN}"
        raise IngestError(f"ingest: the data set {name} is gated; {asked}") from error
    except RepositoryNotFoundError as error:
        raise IngestError(
            f"ingest: there is no folder {path} here, and no data set {name} on the Hugging Face hub that this machine "
            f"may see; look at ingest.path, and for a private one {HOW_TO_LOG_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise IngestError(f"ingest: the data set {name} has no commit, branch or tag {revision!r}") from error
    except (OSError, httpx.HTTPError, HFValidationError) as error:
        raise IngestError(
            f"ingest: there is no folder {path} here, and the Hugging Face hub cannot be asked for {name} "
            f"({type(error).__name__}: {error_message(error)})"
        ) from error


def commit_to_read(path: str) -> str:
    """The commit that `find_sources` found, or else what `commit_of` gives."""
    found = read_json(SOURCES) if SOURCES.exists() else []
    of_path = [own for own in found if (own["source"], own["path"]) == ("huggingface", path) and "files" not in own]
    return of_path[0]["fingerprint"] if of_path else commit_of(path)


def _id_and_revision(path: str) -> tuple[str, str | None]:
    if match := REFERENCE.fullmatch(path):
        return match[1], match[2]
    raise IngestError(f"ingest: the path {path} does not exist; give {WHAT_A_PATH_HOLDS['huggingface']}")
