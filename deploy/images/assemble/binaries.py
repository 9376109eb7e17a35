"""The programs: built by Cargo or given, checked against the base layer, and without debug information."""

import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

from .fault import Fault, program, run
from .packages import ARCHITECTURES, host_architecture
from .source import ROOT

SIDES = ["culvert-server", "culvert-agent"]
# Numbers of architectures in the header of ELF.
MACHINES = {"amd64": 62, "arm64": 183}


def folders(given, architectures, facts):
    """Folder of both programs, by architecture."""
    if given is None:
        return {arch: cargo_build(arch, facts) for arch in architectures}
    alone = len(architectures) == 1
    found = {arch: given if alone else given / arch for arch in architectures}
    missing = [str(folder / side) for folder in found.values() for side in SIDES if not (folder / side).is_file()]
    if missing:
        raise Fault(f"--binaries: {', '.join(missing)} is missing: build it, or name another folder")
    return found


def cargo_build(arch, facts):
    """Builds both programs for this machine."""
    if arch != host_architecture():
        triple = f"{ARCHITECTURES[arch]}-unknown-linux-gnu"
        raise Fault(
            f"programs for {arch} are built elsewhere, or with a cross compiler by cargo build --release --target "
            f"{triple}: name their folder with --binaries"
        )
    commit = {"CULVERT_COMMIT": facts.revision.removesuffix("-dirty")} if facts.revision else {}
    command = [program("cargo", "cargo (or https://rustup.rs)"), "build", "--release", "--locked"]
    packages = [word for side in SIDES for word in ("-p", side)]
    if subprocess.run([*command, *packages], cwd=ROOT, env=os.environ | commit, check=False).returncode != 0:
        raise Fault("cargo build --release failed")
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release"


def split(path, arch, base, debs, output):
    """The program without debug information, which is written beside the images."""
    check(path, arch, base, debs)
    objcopy = objcopy_of(arch)
    debug = output / f"{path.name}-{arch}.debug"
    run(objcopy, "--only-keep-debug", path, debug)
    with tempfile.TemporaryDirectory(dir=output) as work:
        # Symbols stay: profiles and backtraces show the names of functions without the file of debug information.
        lean = Path(work) / path.name
        run(objcopy, "--strip-debug", f"--add-gnu-debuglink={debug}", path, lean)
        return lean.read_bytes()


def objcopy_of(arch):
    """The objcopy that knows an architecture."""
    if arch == host_architecture():
        return program("objcopy", "binutils")
    gnu = ARCHITECTURES[arch]
    return program(f"{gnu}-linux-gnu-objcopy", f"binutils-{gnu.replace('_', '-')}-linux-gnu")


def check(path, arch, base, debs):
    """Reports a program that would not start in the image."""
    with path.open("rb") as file:
        header = file.read(20)
    if header[:4] != b"\x7fELF" or struct.unpack_from("<H", header, 18)[0] != MACHINES[arch]:
        raise Fault(f"{path} is no program for {arch}: name its architecture with --arch")
    readelf = program("readelf", "binutils")
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", run(readelf, "--dynamic", path).decode())
    present = {name.rpartition("/")[2] for name in base}
    missing = [name for name in libraries if name not in present]
    if missing:
        raise Fault(f"{path} needs {', '.join(missing)}, which the base layer lacks: add it to assemble/image.py")
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", run(readelf, "--version-info", path).decode())
    needed = max(((int(major), int(minor)) for major, minor in versions), default=(0, 0))
    libc = next(package.version for package in debs if package.name == "libc6")
    if needed > tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", libc).groups()):
        raise Fault(
            f"{path} needs glibc {needed[0]}.{needed[1]}, and the image has {libc}: build it on Debian 12 or older, "
            "for example with the Dockerfile"
        )
