"""The layers of an image, and its configuration."""

import fnmatch
import io
import json
import tarfile

from .fault import Fault, program, run
from .source import ROOT
from .tree import Tree

# Everything that is taken from the packages. A pattern that matches nothing is a fault: the package has changed.
KEPT = {
    "base-files": ["etc/debian_version", "etc/host.conf", "etc/os-release", "usr/lib/os-release",
                   "usr/share/common-licenses/*"],
    "busybox-static": ["usr/bin/busybox"],
    "ca-certificates": [],
    "gcc-12-base": [],
    "libc6": ["usr/lib/*/ld-linux-*.so.?", "usr/lib/*/libc.so.6", "usr/lib/*/libm.so.6",
              "usr/lib/*/libnss_dns.so.2", "usr/lib/*/libnss_files.so.2", "usr/lib/*/libresolv.so.2"],
    "libgcc-s1": ["usr/lib/*/libgcc_s.so.1"],
}
# The dynamic loader's path is part of a program: a link in this folder, by architecture.
LOADER = {"amd64": "usr/lib64/*", "arm64": "usr/lib/ld-linux-aarch64.so.1"}
LICENCES = "usr/share/doc/*/copyright"
ROOTS = "usr/share/ca-certificates/*/*.crt"
# /bin is /usr/bin, as in every Debian since 12.
MERGED = ["bin", "lib", "lib64", "sbin"]
# A shell and its sleep, for hooks such as `sh -c 'sleep 70'`.
APPLETS = ["sh", "sleep"]
USER = 65532

ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\n"
    f"nonroot:x:{USER}:{USER}:nonroot:/nonexistent:/sbin/nologin\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n",
    "etc/group": f"root:x:0:\nnonroot:x:{USER}:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
# Konnectivity's name and ours.
NAMES = {
    "culvert-server": ["culvert-server", "proxy-server"],
    "culvert-agent": ["culvert-agent", "proxy-agent"],
}
TITLES = {
    "culvert-server": "Culvert server: carries the streams of kube-apiserver to agents on nodes",
    "culvert-agent": "Culvert agent: connects a node or a network to Culvert servers",
}


def base_layer(debs, arch, facts, level):
    """The layer that both images share: C library, shell, certificates, accounts."""
    tree = Tree()
    for folder in ("dev", "etc", "proc", "run", "sys", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "var"):
        tree.folder(folder)
    tree.folder("root", 0o700)
    tree.folder("tmp", 0o1777)
    tree.link("var/run", "/run")
    for name in MERGED:
        tree.link(name, f"usr/{name}")
    for package, path in debs.items():
        unpack(tree, package, path, arch)
    for applet in APPLETS:
        tree.link(f"usr/bin/{applet}", "busybox")
    for path, text in ACCOUNTS.items():
        tree.file(path, text.encode())
    return tree.pack(f"Debian: {', '.join(f'{one.name} {one.version}' for one in debs)}", facts.epoch, level)


def unpack(tree, package, path, arch):
    """Adds what is kept of a package, and its entry in the list that scanners of images read."""
    patterns = KEPT[package.name] + ([LOADER[arch]] if package.name == "libc6" else [])
    unused = set(patterns)
    roots = []
    with tarfile.open(fileobj=io.BytesIO(deb("--fsys-tarfile", path))) as tar:
        for member in tar:
            name = merged(member.name.removeprefix("./"))
            matching = [pattern for pattern in patterns if matches(name, pattern)]
            unused.difference_update(matching)
            if member.isfile() and matches(name, ROOTS):
                roots.append((name, tar.extractfile(member).read()))
            elif member.isfile() and (matching or matches(name, LICENCES)):
                tree.file(name, tar.extractfile(member).read(), member.mode & 0o755)
            elif member.issym() and (matching or matches(name, "usr/share/doc/*")):
                tree.link(name, member.linkname)
    if unused:
        raise Fault(f"{path} lacks {', '.join(sorted(unused))}: change KEPT in assemble/image.py")
    if roots:
        tree.file("etc/ssl/certs/ca-certificates.crt", b"".join(ended(data) for _, data in sorted(roots)))
    elif package.name == "ca-certificates":
        raise Fault(f"{path} has no certificates")
    tree.file(f"var/lib/dpkg/status.d/{package.name}", deb("--field", path))


def matches(name, pattern):
    """Whether a path is one of a pattern, whose stars match no slash."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def deb(option, path):
    """A part of a .deb."""
    return run(program("dpkg-deb", "dpkg"), option, path, remedy="Remove the file, and it is downloaded again.")


def merged(name):
    """Path below /usr of what is in /bin, /lib, /lib64 or /sbin."""
    return f"usr/{name}" if name.partition("/")[0] in MERGED else name


def ended(data):
    """A certificate that ends with a line break."""
    return data if data.endswith(b"\n") else data + b"\n"


def program_layer(side, data, components, facts, level):
    """The layer with a program, its names, its licence and its list of components."""
    tree = Tree()
    tree.file(f"usr/bin/{side}", data, 0o755)
    for name in NAMES[side]:
        tree.link(name, f"usr/bin/{side}")
        if name != side:
            tree.link(f"usr/bin/{name}", side)
    tree.file("usr/share/doc/culvert/LICENSE", (ROOT / "LICENSE").read_bytes())
    tree.file(f"usr/share/doc/culvert/{side}.cdx.json", components)
    return tree.pack(f"{side} {facts.version}", facts.epoch, level)


class Image:
    """An image for one architecture: layers, configuration, manifest."""

    def __init__(self, side, arch, layers, facts):
        self.arch, self.layers = arch, layers
        self.labels = labels(side, facts)
        self.config = encode(config(side, arch, layers, self.labels, facts))

    def compressed_size(self):
        """Bytes of a download."""
        return len(self.config) + sum(len(layer.data) for layer in self.layers)


def config(side, arch, layers, labelled, facts):
    """The configuration: user, entry point and the layers."""
    return {
        "created": facts.created,
        "architecture": arch,
        **({"variant": "v8"} if arch == "arm64" else {}),
        "os": "linux",
        "config": {
            "User": f"{USER}:{USER}",
            # Started under Konnectivity's name, a program has Konnectivity's default ports.
            "Entrypoint": [f"/{NAMES[side][1]}"],
            "Env": ["PATH=/usr/sbin:/usr/bin", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"],
            "WorkingDir": "/",
            "Labels": labelled,
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [
            {"created": facts.created, "created_by": "deploy/images/build", "comment": layer.comment}
            for layer in layers
        ],
    }


def labels(side, facts):
    """What the image says about itself."""
    found = {
        "title": side,
        "description": TITLES[side],
        "version": facts.version,
        "licenses": facts.license,
        "created": facts.created,
        "revision": facts.revision,
        "source": facts.source,
        "url": facts.source,
        "documentation": facts.source and f"{facts.source}/tree/HEAD/docs",
    }
    return {f"org.opencontainers.image.{key}": value for key, value in sorted(found.items()) if value}


def encode(value):
    """JSON whose bytes depend on the value alone."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
