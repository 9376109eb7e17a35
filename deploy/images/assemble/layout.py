"""An OCI image layout in a tar file: https://github.com/opencontainers/image-spec/blob/main/image-layout.md."""

import io
import re
import tarfile

from .fault import Fault
from .image import encode
from .tree import digest

CONFIG = "application/vnd.oci.image.config.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def check_tags(tags):
    """Reports tags that no registry accepts."""
    wrong = [tag for tag in tags if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", tag)]
    if wrong:
        raise Fault(f"--tag: not a tag: {', '.join(wrong)}; a tag has letters, digits, '_', '.' and '-'")


def write(path, images, registry, tags, facts):
    """Writes the images of one side. Returns the digest of what the tags name."""
    blobs = {}
    manifests = [manifest(image, blobs) for image in images]
    if len(manifests) == 1:
        named = manifests[0]
    else:
        named = blob(blobs, INDEX, encode(index(manifests, annotations=images[0].labels)))
    side = path.name.removesuffix(".oci.tar")
    names = [f"{registry.rstrip('/')}/{side}:{tag}" for tag in tags]
    entries = [
        {
            **named,
            "annotations": {
                "org.opencontainers.image.ref.name": tag,
                # The whole name, which `ctr`, `nerdctl` and `podman` prefer.
                "io.containerd.image.name": name,
            },
        }
        for tag, name in zip(tags, names, strict=True)
    ]
    files = {blob_path(name): data for name, data in blobs.items()}
    files["oci-layout"] = encode({"imageLayoutVersion": "1.0.0"})
    files["index.json"] = encode(index(entries))
    if len(images) == 1:
        files["manifest.json"] = encode([for_docker(images[0], names)])
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for folder in ("blobs", "blobs/sha256"):
            add(tar, folder, facts, tarfile.DIRTYPE, 0o755)
        for name, data in sorted(files.items()):
            add(tar, name, facts, tarfile.REGTYPE, 0o644, data)
    return named["digest"]


def blob_path(name):
    """Path of a blob in the layout."""
    return f"blobs/sha256/{name.removeprefix('sha256:')}"


def for_docker(image, names):
    """The entry of an image for `docker load` and `podman load`, which take no layout, or none with several tags."""
    layers = [blob_path(digest(layer.data)) for layer in image.layers]
    return {"Config": blob_path(digest(image.config)), "RepoTags": names, "Layers": layers}


def add(tar, name, facts, kind, mode, data=b""):
    """Adds an entry whose bytes depend on its name and contents alone."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.mtime = kind, mode, len(data), facts.epoch
    tar.addfile(info, io.BytesIO(data))


def manifest(image, blobs):
    """Adds an image to the blobs. Returns the descriptor of its manifest."""
    contents = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": blob(blobs, CONFIG, image.config),
        "layers": [blob(blobs, LAYER, layer.data) for layer in image.layers],
        "annotations": image.labels,
    }
    system = {"os": "linux", "architecture": image.arch}
    if image.arch == "arm64":
        system["variant"] = "v8"
    return {**blob(blobs, MANIFEST, encode(contents)), "platform": system}


def index(manifests, **more):
    """An index of manifests."""
    return {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests, **more}


def blob(blobs, media_type, data):
    """Adds a blob. Returns its descriptor."""
    name = digest(data)
    blobs[name] = data
    return {"mediaType": media_type, "digest": name, "size": len(data)}
