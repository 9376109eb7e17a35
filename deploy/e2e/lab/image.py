"""Images of BusyBox and a program. That of the lab has the HTTPS server of the webhook and the aggregated API."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile

NAME = "localhost/lab:1"
COMMAND = ["/bin/sleep", "2147483647"]
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n",
    "etc/group": "root:x:0:\nuser:x:1000:\n",
}


def write(parts, target):
    """Writes the image as a tar file. Without a command it sleeps, so it is the image of sandboxes too."""
    pack(target, layer_of(parts, {"services": parts.path("services")}), {NAME: {"Cmd": COMMAND}})


def pack(target, layer, images):
    """Writes images of one layer as an OCI layout, which `ctr images import` takes. `images` maps their names to what
    their configurations have besides."""
    packed = gzip.compress(layer, 1, mtime=0)
    blobs, entries = [packed], []
    for name, settings in images.items():
        config = add(blobs, {
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["PATH=/bin:/"], "WorkingDir": "/tmp"} | settings,
            "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
        })
        manifest = add(blobs, {
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": describe(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [describe(packed, "application/vnd.oci.image.layer.v1.tar+gzip")],
        })
        entries.append(describe(manifest, MANIFEST) | {"annotations": {"io.containerd.image.name": name}})
    with tarfile.open(target, "w") as tar:
        put(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        put(tar, "index.json", json.dumps({"schemaVersion": 2, "manifests": entries}).encode())
        for path, blob in {f"blobs/{digest(blob).replace(':', '/')}": blob for blob in blobs}.items():
            put(tar, path, blob)


def layer_of(parts, programs):
    """BusyBox and these programs, as a tar."""
    buffer = io.BytesIO()
    busybox = parts.path("busybox")
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for folder, mode in {"bin": 0o755, "etc": 0o755, "root": 0o700, "tmp": 0o1777}.items():
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            tar.addfile(entry)
        put(tar, "bin/busybox", busybox.read_bytes(), 0o755)
        for name, program in programs.items():
            put(tar, name, program.read_bytes(), 0o755)
        for applet in applets:
            if applet != "busybox":
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        for path, text in FILES.items():
            put(tar, path, text.encode())
    return buffer.getvalue()


def put(tar, name, content, mode=0o644):
    """Adds a file."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def add(blobs, document):
    """Adds a document to the blobs. Returns its bytes."""
    blobs.append(json.dumps(document).encode())
    return blobs[-1]


def describe(blob, media_type):
    """An OCI descriptor."""
    return {"mediaType": media_type, "digest": digest(blob), "size": len(blob)}


def digest(content):
    """The digest of a blob."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
