"""Links in a folder of somebody's model or adapter: where they may lead.

Takes a folder; raises UserError for a link to something that is not the folder's own. Files of such a folder are copied
and uploaded under their names, so a LICENSE that is a link to somebody's token file must not pass for a licence.
"""

from pathlib import Path

from pipeline.console import UserError
from pipeline.foreign import printable


def check_links(folder: Path) -> None:
    """Raise UserError for a link in `folder` that leads out of it, or to nothing. Hidden files and folders do not count.

    Allowed are links within the folder and, of a snapshot in a Hub cache, those to the files of the same model that the
    cache keeps (models--OWNER--NAME/snapshots/REVISION/x → models--OWNER--NAME/blobs/HASH).
    """
    root = folder.resolve()
    allowed = [root, *_blobs(root)]
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_symlink() or any(part.startswith(".") for part in inside.parts):
            continue
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):  # what 3.11 raises for a link to itself
            raise UserError(
                f"{printable(path)} is a link to {printable(path.readlink())}, which is not there. Put the file in its "
                "place, or remove the link."
            ) from None
        if not any(target.is_relative_to(place) for place in allowed):
            raise UserError(
                f"{printable(path)} is a link to {printable(target)}, outside the folder: it would be read, copied and "
                "uploaded as the model's own. Put a copy of the file in its place, or remove the link."
            )


def _blobs(root: Path) -> list[Path]:
    """Where a Hub cache keeps the files of the snapshot `root`; nothing where it is none."""
    model = root.parent.parent
    if root.parent.name != "snapshots" or not model.name.startswith("models--"):
        return []
    return [(model / "blobs").resolve()]
