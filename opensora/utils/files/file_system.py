"""What kind of file system a path is on: some promise less than a disk of the machine itself."""

import os
from pathlib import Path

LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "overlay", "vfat", "f2fs"))
# Of several machines, or of a server: locks of one machine may not be seen by another, and shared memory is not shared.
_NETWORK = (
    "9p afs beegfs ceph cifs coda gfs gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs pvfs2 smb2 smb3 smbfs "
    "wekafs fuse.blobfuse2 fuse.ceph fuse.ceph-fuse fuse.gcsfuse fuse.glusterfs fuse.JuiceFS fuse.juicefs fuse.rclone "
    "fuse.s3fs fuse.sshfs"
)
NETWORK = frozenset(_NETWORK.split())


def file_system(path: Path) -> str:
    """Kind of the file system that ``path`` is on, or would be (ext4, nfs4); empty where the system does not say."""
    try:
        mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return ""
    where, best = f"{os.path.realpath(path)}/", ("", "")
    for mount, about in mounts:
        point = mount.split()[4].encode().decode("unicode_escape").rstrip("/") + "/"  # blanks are written \040
        if where.startswith(point) and len(point) >= len(best[0]):  # of several at one place the last is seen
            best = point, about.split()[0]
    return best[1]
