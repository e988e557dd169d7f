"""Read an uploaded image to pixels in memory, and delete its file at once.

    D/HASH/scan.dcm   written by gradio      ->  {"": image, "lung": image, ...}, no file left
    D                 temporary_folder: only the owner can read it; removed when the program ends

Images are read by the readers of the rest of the project, so their limits of bytes and pixels hold:
medmax_jax/models/images.py and, for DICOM files, medmax_jax/data/image_tokens/dicom.py. Nothing of
a header is kept, and messages contain neither the file's name nor a value of its header.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import PIL.Image

from medmax_jax.data.image_tokens import dicom
from medmax_jax.data.records.row_streams import SourceError
from medmax_jax.generation.model_bundle import MAX_PIXELS
from medmax_jax.models import images
from medmax_jax.models.image_headers import ImageError

MAX_BYTES = 2**26  # 64 MiB, a radiograph of 32 million pixels; the server refuses larger files
NAME = "the file"  # in messages
_MAGIC = slice(128, 132)  # of a DICOM file, where it is DICM


class UploadError(ValueError):
    """A file that is not shown; the message states the problem and the fix."""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Create the folder that gradio writes to; remove it with everything in it.

    It is set before gradio is imported, which reads the variable when its components are created.
    """
    with tempfile.TemporaryDirectory(prefix="medmax-demo-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def read(path: str | os.PathLike) -> dict[str, PIL.Image.Image]:
    """Return the image by the name of its window, "" for that of the file; delete the file.

    Only a CT in DICOM has several. Raises UploadError.
    """
    path = Path(path)
    try:
        if _is_dicom(path):
            return dicom.load_windows(path, name=NAME, max_pixels=MAX_PIXELS)
        return {"": images.load(path, max_pixels=MAX_PIXELS, name=NAME)}
    except (ImageError, SourceError) as error:
        raise UploadError(str(error)) from None
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another upload of the same bytes is in it
            path.parent.rmdir()


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(_MAGIC.stop)[_MAGIC] == b"DICM"
    except OSError as error:
        raise UploadError(f"{NAME}: no longer there; upload it again") from error
