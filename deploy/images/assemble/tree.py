"""A layer: files, folders and links, written as a tar file whose bytes depend on them alone."""

import gzip
import hashlib
import io
import tarfile
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A compressed layer."""

    tree: "Tree"
    data: bytes
    """The compressed tar file."""
    diff_id: str
    """Digest of the tar file before compression."""
    comment: str

    def names(self):
        """Paths in this layer, without a leading slash."""
        return set(self.tree.entries)

    def unpack(self, folder):
        """Writes the files to a folder."""
        with tarfile.open(fileobj=io.BytesIO(self.data), mode="r:gz") as tar:
            # Newer versions of Python refuse absolute links by default.
            tar.extraction_filter = lambda member, _: member
            tar.extractall(folder)


class Tree:
    """What a layer holds. Everything belongs to root."""

    def __init__(self):
        self.entries = {}

    def file(self, path, data, mode=0o644):
        """Adds a file, and the folders above it."""
        self.add(path, tarfile.REGTYPE, mode, data=data)

    def link(self, path, target):
        """Adds a symbolic link."""
        self.add(path, tarfile.SYMTYPE, 0o777, target=target)

    def folder(self, path, mode=0o755):
        """Adds a folder."""
        self.add(path, tarfile.DIRTYPE, mode)

    def add(self, path, kind, mode, data=b"", target=""):
        """Adds an entry."""
        above = path.rpartition("/")[0]
        if above and above not in self.entries:
            self.folder(above)
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.size, info.linkname = kind, mode, len(data), target
        info.uname = info.gname = "root"
        self.entries[path] = (info, data)

    def tar(self, epoch):
        """The tar file of the entries, all of this date."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for _, (info, data) in sorted(self.entries.items()):
                info.mtime = epoch
                tar.addfile(info, io.BytesIO(data))
        return packed.getvalue()

    def pack(self, comment, epoch, level):
        """The layer. `epoch` is the date of its files, `level` that of gzip."""
        tar = self.tar(epoch)
        compressed = io.BytesIO()
        # Without a name and a time in its header.
        with gzip.GzipFile("", "wb", level, compressed, mtime=0) as file:
            file.write(tar)
        return Layer(self, compressed.getvalue(), digest(tar), comment)


def digest(data):
    """Digest as OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
