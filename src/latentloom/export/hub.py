"""An exported model on its way to the Hugging Face hub: what would be sent, then the sending.

The token is that which Hugging Face's own programs use: of the environment (``HF_TOKEN``) or of ``hf auth login``.
"""

from dataclasses import dataclass
from pathlib import Path

from latentloom.errors import UserError
from latentloom.export.folders import ORIGIN
from latentloom.files import user_path

CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """The files of an exported folder, and the hub's repository that they are for."""

    folder: Path
    hub_id: str
    public: bool
    files: tuple[str, ...]  # all that is sent, by paths below the folder

    @classmethod
    def of(cls, folder: Path, hub_id: str, *, public: bool) -> "Upload":
        """What `send` would send; nothing is asked of the hub.

        Raises:
            UserError: when the folder is none that `latentloom export` made, or the id none that the hub can have.
        """
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        folder = user_path(folder)
        if not all((folder / name).is_file() for name in (CARD, ORIGIN)):
            raise UserError(
                f"{folder} is no exported model: `latentloom export MODEL {folder} --to diffusers` makes one"
            )
        try:
            validate_repo_id(hub_id)
        except HFValidationError as error:
            raise UserError(f"{hub_id!r} is no id of the hub: {str(error).splitlines()[0]}") from error
        if hub_id.count("/") != 1:
            raise UserError(f"{hub_id!r} is no id of the hub: give OWNER/NAME, the owner being you or an organisation")
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return cls(folder, hub_id, public, tuple(files))

    def text(self) -> str:
        """For a person: where it goes, who will see it, and each file with its size."""
        from huggingface_hub import constants

        sizes = [(self.folder / file).stat().st_size for file in self.files]
        width = max(len(file) for file in self.files)
        rows = [f"  {file:<{width}}  {size:>14,} bytes" for file, size in zip(self.files, sizes, strict=True)]
        seen = "public: everybody can see and load it" if self.public else "private: nobody else sees it (--public)"
        total = f"{len(self.files)} files, {sum(sizes) / 1e6:,.1f} MB"
        return "\n".join([f"{constants.ENDPOINT}/{self.hub_id}", seen, *rows, total])

    def send(self) -> str:
        """Make the repository where there is none, and send the files as one commit; its address.

        Raises:
            UserError: when there is no token, the hub rejects it or the files, the network is away, or the repository
                is there already and seen by others than asked for.
        """
        from huggingface_hub import CommitOperationAdd, HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import httpx

        if get_token() is None:
            raise UserError("no token of the hub: run `hf auth login`, or set HF_TOKEN to one that may write")
        api = HfApi()
        try:
            api.create_repo(self.hub_id, private=not self.public, exist_ok=True)
            if bool(api.repo_info(self.hub_id).private) == self.public:
                there, say = ("private", "leave --public out") if self.public else ("public", "say --public")
                raise UserError(f"{self.hub_id} is there already, and {there}: {say}, or change that on its page")
            added = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=self.folder / file) for file in self.files]
            sent = api.create_commit(self.hub_id, added, commit_message="A model of Latent Loom")
        except (HfHubHTTPError, httpx.HTTPError, ConnectionError) as error:
            said = getattr(error, "server_message", None) or str(error).splitlines()[0]
            raise UserError(f"not sent to {self.hub_id}: {said} ({type(error).__name__})") from error
        return str(sent.commit_url)
