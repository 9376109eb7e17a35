"""The list of components of an image, in the format of CycloneDX 1.5."""

import json
import re
import uuid
from urllib.parse import quote

from .fault import program, run
from .packages import ARCHITECTURES, SUITE
from .source import ROOT, read_toml

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "culvert.images")
LINE = re.compile(r"(\d+)\|(\S+) v(\S+)[^|]*\|(.*?)( \(\*\))?")


def document(side, arch, debs, facts):
    """The list: the crates that are linked into a program, and the Debian packages of the base layer."""
    crates, edges = crates_of(side, arch)
    packages = [debian(package, arch) for package in debs]
    root = f"{side}-image"
    edges[root] = {crate_url(side, facts.version), *(package["purl"] for package in packages)}
    contents = {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": facts.created,
            "component": {
                "bom-ref": root,
                "type": "container",
                "name": side,
                "version": facts.version,
                "licenses": [{"expression": facts.license}],
            },
        },
        "components": sorted([*crates, *packages], key=lambda component: component["purl"]),
        "dependencies": [{"ref": ref, "dependsOn": sorted(on)} for ref, on in sorted(edges.items())],
    }
    # The same components have the same number, so that two builds give the same file.
    contents["serialNumber"] = f"urn:uuid:{uuid.uuid5(NAMESPACE, json.dumps(contents, sort_keys=True))}"
    return json.dumps(contents, indent=1, sort_keys=True).encode() + b"\n"


def crates_of(side, arch):
    """Components of the crates of a program, and which crate uses which. Without crates of builds and tests."""
    text = run(
        program("cargo", "cargo (or https://rustup.rs)"), "tree", "--locked", "-p", side, "-e", "normal,no-proc-macro",
        "--target", f"{ARCHITECTURES[arch]}-unknown-linux-gnu", "--prefix", "depth", "-f", "|{p}|{l}",
        cwd=ROOT,
    ).decode()
    checksums = {
        (package["name"], package["version"]): package.get("checksum") for package in read_toml("Cargo.lock")["package"]
    }
    found, edges, above = {}, {}, []
    for line in text.splitlines():
        depth, name, version, license_, _ = LINE.fullmatch(line).groups()
        url = crate_url(name, version)
        found.setdefault(url, crate(name, version, license_, checksums.get((name, version))))
        edges.setdefault(url, set())
        del above[int(depth):]
        if above:
            edges[above[-1]].add(url)
        above.append(url)
    return list(found.values()), edges


def crate(name, version, license_, checksum):
    """Component of a crate."""
    url = crate_url(name, version)
    component = {"bom-ref": url, "type": "library", "name": name, "version": version, "purl": url}
    if license_:
        # Older manifests separate licences with a slash.
        component["licenses"] = [{"expression": license_.replace("/", " OR ")}]
    if checksum:
        component["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return component


def crate_url(name, version):
    """Package URL of a crate."""
    return f"pkg:cargo/{name}@{quote(version, safe='')}"


def debian(package, arch):
    """Component of a Debian package."""
    version = quote(package.version, safe="~")
    url = f"pkg:deb/debian/{package.name}@{version}?arch={package.architecture}&distro={SUITE}"
    return {
        "bom-ref": url,
        "type": "library",
        "name": package.name,
        "version": package.version,
        "purl": url,
        "hashes": [{"alg": "SHA-256", "content": package.sha256}],
    }
