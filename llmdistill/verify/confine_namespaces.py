"""A root directory, network and process table of one's own, by Linux namespaces and without any helper program.

The new root holds the Python installation and the system's libraries, read-only, at their usual paths, four harmless
devices and nothing else: no home, no /proc, no /etc. An unprivileged user gets there through a user namespace; where
distributions forbid those (kernel.apparmor_restrict_unprivileged_userns, user.max_user_namespaces, the default filter
of container engines), enter() raises OSError and the caller falls back to Landlock.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress

from llmdistill.verify.confine import syscall

_libc = ctypes.CDLL(None, use_errno=True)

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_MNT_DETACH = 2
_MOUNT_SETATTR, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, 0x8000, 1
_OPEN_TREE, _MOVE_MOUNT, _AT_FDCWD, _CLONE_TREE, _FROM_HANDLE = 428, 429, -100, 0x80001, 4
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def readable_paths(extra: Iterable[str] = ()) -> list[str]:
    """Existing files and directories that a Python program needs to read: the interpreter's library, installed
    packages (``extra``: more of these), shared libraries. Never a whole prefix: a virtual environment may lie next to
    things that are nobody's business."""
    wanted = ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    wanted.append("/nix/store")
    for prefix in (sys.base_prefix, sys.base_exec_prefix, sys.prefix):
        wanted += [os.path.join(prefix, "lib"), os.path.join(prefix, "lib64")]
    wanted += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    wanted += extra
    seen = {path: None for path in wanted if os.path.isabs(path) and path != "/" and os.path.exists(path)}
    return list(seen)


def enter(paths: Iterable[str], outside: int | None) -> tuple[list[str], int | None, bool]:
    """Move the calling process into new namespaces and a new root that shows ``paths``. Its next child will be the
    first process of a process namespace.

    Args:
        outside: the uid, as seen from here, of root's programs; None where there is none to be had.
    Returns:
        The names of the namespaces, the uid that programs should switch to (None: stay), and whether its tasks are
        counted apart from those of processes outside.
    Raises:
        OSError: not allowed here. The process is then half moved and should end.
    """
    user, uid, root = True, None, os.geteuid() == 0
    try:
        uid = _user_namespace(outside)
    except OSError:
        if not root or outside is None:
            raise
        user, uid = False, outside  # root of a machine without user namespaces
        _unshare(_NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
    _new_root(list(paths))
    names = (["user"] if user else []) + ["mount", "pid", "network", "ipc", "uts"]
    if root:  # root's own tasks are not counted at all
        return names, uid, uid is not None
    return names, uid, _kernel() >= (5, 14)


def private_folder(path: str, size: int, uid: int | None, readable: Iterable[str] = ()) -> None:
    """Cover ``path`` by an empty file system in memory of ``size`` bytes and at most 1,024 files, seen by the calling
    process only and gone with it. Those of ``readable`` beneath it (a Python under /tmp) can be seen through it."""
    _unshare(_NEWNS)
    beneath = [p for p in _layout(list(readable))[0] if _beneath(p, path) and os.path.isdir(p)]
    # Detached copies of these mounts: there is no /proc here any more through which an open directory could be bound.
    held = {p: syscall(_OPEN_TREE, _AT_FDCWD, p.encode(), _CLONE_TREE | _AT_RECURSIVE) for p in beneath}
    owner = "" if uid is None else f",uid={uid},gid={uid}"
    _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=1024,mode=0700{owner}")
    for target, handle in held.items():
        os.makedirs(target)
        syscall(_MOVE_MOUNT, handle, b"", _AT_FDCWD, target.encode(), _FROM_HANDLE)
        _read_only(target)
        os.close(handle)


def _user_namespace(outside: int | None) -> int | None:
    """unshare everything with a user namespace whose ids are mapped by a helper outside of it."""
    me, root = os.getpid(), os.geteuid() == 0
    own = (os.geteuid(), os.getegid())
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(go)
            if os.read(ready, 1) == b"+":
                status = _write_maps(me, outside if root else None, own)
        finally:
            os._exit(status)
    os.close(ready)
    try:
        _unshare(_NEWUSER | _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS)
        os.write(go, b"+")
    finally:
        os.close(go)
        status = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if status not in (0, 2):
        raise PermissionError(1, "the ids of a user namespace cannot be mapped")
    if status == 0 and root and outside is not None:
        return 1
    return None


def _write_maps(pid: int, programs: int | None, own: tuple[int, int]) -> int:
    """Map the starting user to 0, and root's programs, who are 1 inside, to ``programs`` outside. 0: mapped as wanted;
    2: mapped, but the second id was refused; raises OSError else."""
    if own[0] != 0:
        with suppress(FileNotFoundError):
            _write(f"/proc/{pid}/setgroups", "deny")
    status = 0
    if programs is not None:
        try:
            _write(f"/proc/{pid}/uid_map", f"0 {own[0]} 1\n1 {programs} 1")
            _write(f"/proc/{pid}/gid_map", f"0 {own[1]} 1\n1 {programs} 1")
            return 0
        except OSError:  # root of a container that has one id only
            status = 2
    _write(f"/proc/{pid}/uid_map", f"0 {own[0]} 1")
    _write(f"/proc/{pid}/gid_map", f"0 {own[1]} 1")
    return status


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _new_root(paths: list[str]) -> None:
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)
    bindings, links = _layout(paths)
    # Held open: the mount below may hide a Python that lives under /tmp.
    held = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in (*bindings, *DEVICES)}
    directories = {path: os.path.isdir(path) for path in held}
    base = next(path for path in ("/tmp", "/var/tmp", "/mnt", "/run", "/dev/shm") if os.path.isdir(path))
    own_proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for path, handle in held.items():
        target = base + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if directories[path]:
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
        _mount(f"/proc/self/fd/{handle}", target, None, _MS_BIND | _MS_REC, None)
        _read_only(target)
        os.close(handle)
    os.close(own_proc)
    for path, target in links.items():
        if not os.path.lexists(base + path):
            os.makedirs(os.path.dirname(base + path), exist_ok=True)
            os.symlink(target, base + path)
    os.makedirs(base + "/tmp", exist_ok=True)
    os.chdir(base)
    dot = ctypes.c_char_p(b".")
    syscall(_PIVOT_ROOT[os.uname().machine], dot, dot)
    _check(_libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")
    _read_only("/", recursive=False)


def _layout(paths: list[str]) -> tuple[list[str], dict[str, str]]:
    """Directories to bind, none beneath another, and symbolic links to make (/lib -> /usr/lib)."""
    links = {path: real for path in paths if (real := os.path.realpath(path)) != path}
    bindings: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths}, key=len):
        if not any(_beneath(path, above) for above in bindings):
            bindings.append(path)
    return bindings, {path: target for path, target in links.items() if not any(_beneath(path, b) for b in bindings)}


def _beneath(path: str, above: str) -> bool:
    return path == above or path.startswith(above.rstrip("/") + "/")


def _read_only(target: str, *, recursive: bool = True) -> None:
    attributes = struct.pack("4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    try:
        syscall(_MOUNT_SETATTR, -100, ctypes.c_char_p(target.encode()), flags, ctypes.c_char_p(attributes), 32)
    except OSError:  # Linux before 5.12: one mount at a time, the flags it has must be named again
        kept = os.statvfs(target).f_flag & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        for mount in (target, *(_mounts_beneath(target) if recursive else ())):
            _mount(None, mount, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | kept, None)


def _mounts_beneath(target: str) -> Iterator[str]:
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            point = line.split()[4].encode().decode("unicode_escape")
            if point != target and _beneath(point, target):
                yield point


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]))


def _unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)
