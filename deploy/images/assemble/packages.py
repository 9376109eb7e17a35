"""Debian packages of the base layer: pinned in packages.lock, downloaded by apt into folders of its own."""

import hashlib
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .fault import Fault, Unreachable, program, run

LOCK = Path(__file__).resolve().parents[1] / "packages.lock"
SUITE = "bookworm"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Debian's names of architectures, and those of the GNU toolchain.
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
# gcc-12-base has the licence of libgcc-s1.
NAMES = ["base-files", "busybox-static", "ca-certificates", "gcc-12-base", "libc6", "libgcc-s1"]
HEADER = f"""\
# Debian packages of the base layer of the images, from {SUITE}: name, version, architecture, SHA-256 of the .deb.
# `deploy/images/build --update-packages` writes this file.
"""


@dataclass(frozen=True)
class Package:
    """A line of the lock, and its file."""

    name: str
    version: str
    architecture: str
    sha256: str

    @property
    def file(self):
        """Name of the .deb, as apt writes it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


def host_architecture():
    """Debian's name of this machine's architecture."""
    for debian, gnu in ARCHITECTURES.items():
        if platform.machine() == gnu:
            return debian
    raise Fault(f"there are no images for {platform.machine()}: name one of {', '.join(ARCHITECTURES)} with --arch")


def locked(arch):
    """The packages of an architecture, by name."""
    lines = [line.split() for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    found = {fields[0]: Package(*fields) for fields in lines if fields[2] in (arch, "all")}
    missing = [name for name in NAMES if name not in found]
    if missing:
        raise Fault(f"packages.lock lacks {', '.join(missing)} for {arch}: run with --update-packages")
    return found


def fetch(arch, folder, mirror, work):
    """Paths of the checked .deb files of an architecture, by package."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {package: folder / package.file for package in locked(arch).values()}
    missing = [package for package, path in paths.items() if not path.exists()]
    for package in paths.keys() - missing:
        check(package, paths[package])
    if missing:
        download(missing, arch, folder, mirror, work)
    return paths


def check(package, path):
    """Reports a file that is not the one of the lock."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise Fault(f"{path} is not the file of packages.lock: its SHA-256 differs; remove it")


def download(missing, arch, folder, mirror, work):
    """Downloads packages with apt, by their exact versions."""
    apt = Apt(arch, mirror, work / f"apt-{arch}")
    names = [f"{package.name}={package.version}" for package in missing]
    remedy = (
        "A mirror keeps the newest versions alone. Run with --update-packages, or take the files of packages.lock "
        "from https://snapshot.debian.org and name their folder with --packages."
    )
    apt.run("apt-get", "download", *names, remedy=remedy, cwd=apt.folder)
    for package in missing:
        path = apt.folder / package.file
        check(package, path)
        shutil.move(path, folder / package.file)


def update_lock(mirror):
    """Writes the newest versions of all architectures."""
    lines = set()
    with tempfile.TemporaryDirectory() as work:
        for arch in ARCHITECTURES:
            apt = Apt(arch, mirror, Path(work) / arch)
            text = apt.run("apt-cache", "show", "--no-all-versions", *NAMES).decode()
            for paragraph in text.strip().split("\n\n"):
                fields = dict(re.findall(r"^(\S+): (.*)$", paragraph, re.MULTILINE))
                lines.add(" ".join(fields[key] for key in ("Package", "Version", "Architecture", "SHA256")))
    LOCK.write_text(HEADER + "".join(f"{line}\n" for line in sorted(lines)))
    print(f"{LOCK}: {len(lines)} packages")


class Apt:
    """apt with state of its own, for a user without privileges and for any architecture."""

    def __init__(self, arch, mirror, folder):
        program("apt-get", "apt")
        if not Path(KEYS).exists():
            raise Unreachable(f"{KEYS} is missing: apt-get install debian-archive-keyring")
        self.folder = folder
        for part in ("state/lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        (folder / "status").touch()
        archives = [("debian", SUITE), ("debian", f"{SUITE}-updates"), ("debian-security", f"{SUITE}-security")]
        lines = [f"deb [signed-by={KEYS}] {mirror}/{path} {suite} main\n" for path, suite in archives]
        (folder / "sources.list").write_text("".join(lines))
        settings = {
            "APT::Architecture": arch,
            "APT::Architectures": arch,
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State": folder / "state",
            "Dir::State::Status": folder / "status",
            "Dir::Cache": folder / "cache",
        }
        self.options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        remedy = f"{mirror} must be reachable; --mirror names another one, and --packages a folder of .deb files."
        self.run("apt-get", "update", "--error-on=any", remedy=remedy)

    def run(self, tool, *args, **options):
        """Output of a program of apt."""
        return run(tool, "-q", *self.options, *args, fault=Unreachable, **options)
