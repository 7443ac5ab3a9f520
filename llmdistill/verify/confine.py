"""What a Linux process can give up without help: file access (Landlock), privileges, resources, open files.

Every function acts on the calling process, for good, and raises OSError where the kernel refuses. System-call filters
are in confine_seccomp.py, namespaces in confine_namespaces.py, users in confine_identity.py; sandbox_zygote.py puts
them in order.

Memory is bounded as address space, process by process, files as a small tmpfs; and where this user was delegated a
control group, all of a program's together (confine_cgroup.py).
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterable
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)

# Same numbers on x86_64 and aarch64: all were added after the tables were unified.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_CAPSET = {"x86_64": 126, "aarch64": 91}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 1, 4, 8, 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 36, 47, 4

# include/uapi/linux/landlock.h
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REFER, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
_ALL_OF_ABI_1 = (1 << 13) - 1
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NET_TCP = 0b11  # bind, connect: ABI 4
_SCOPES = 0b11  # abstract sockets, signals to outside of the domain: ABI 6


def syscall(number: int, *arguments: object) -> int:
    """A raw system call. Raises OSError with the kernel's errno."""
    ctypes.set_errno(0)
    plain = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    _libc.syscall.restype = ctypes.c_long
    result = int(_libc.syscall(ctypes.c_long(number), *plain))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, *arguments: int) -> int:
    """prctl(2) with its arguments padded by zeros, as the kernel wants them."""
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    result = int(_libc.prctl(ctypes.c_int(option), *padded))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def die_with_parent() -> None:
    """SIGKILL when the parent's thread ends. Only for children of single-threaded parents, after they became another
    user: that forgets it."""
    prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Grandchildren that lose their parent become ours, so that they can be found and killed."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """No setuid program and no file capability gives anything back; Landlock and seccomp ask for it."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def limit_resources(
    *, address_space: int, file_bytes: int, cpu_seconds: int, open_files: int = 64, tasks: int | None = None
) -> None:
    """Hard resource limits: bytes, bytes, seconds, counts. ``tasks`` are processes and threads, all that the user has
    (confine_identity.TaskLimit)."""
    _limit(resource.RLIMIT_AS, address_space)
    _limit(resource.RLIMIT_FSIZE, file_bytes)
    _limit(resource.RLIMIT_NOFILE, open_files)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_MEMLOCK, 0)
    _limit(resource.RLIMIT_MSGQUEUE, 0)
    _limit(resource.RLIMIT_STACK, 64 << 20)  # deep recursion in C code; threads keep the size read at start
    limit_tasks(tasks)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    wanted = cpu_seconds + 1 if hard == resource.RLIM_INFINITY else min(cpu_seconds + 1, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (max(1, wanted - 1), wanted))  # SIGXCPU, then SIGKILL a second later


def limit_tasks(tasks: int | None) -> None:
    """At most so many processes and threads of this user; None: as before."""
    if tasks is not None:
        _limit(resource.RLIMIT_NPROC, tasks)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def bound_capabilities() -> None:
    """No program that this process or its children run gains a capability. Once, before they are forked."""
    for capability in range(64):
        try:
            if prctl(_PR_CAPBSET_READ, capability):
                prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # past the last capability of this kernel, or not ours to drop
            continue


def become(uid: int | None, keep: int | None = None) -> None:
    """Become ``uid`` (None: stay) without groups, and give up every capability but ``keep``, those of a user namespace
    included. None comes back by running a program either, after bound_capabilities()."""
    if uid is not None:
        if keep is not None:
            prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    with suppress(OSError):  # Linux before 4.3 has none
        prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("Ii", 0x20080522, 0)
    kept = 0 if keep is None else 1 << keep
    sets = struct.pack("6I", kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable; then those above 31
    syscall(_CAPSET[os.uname().machine], ctypes.c_char_p(header), ctypes.c_char_p(sets))
    prctl(_PR_SET_DUMPABLE, 0)  # nobody of the same uid may attach or read its memory


def landlock_abi() -> int:
    """Version of Landlock in this kernel, 0 where it is absent or switched off."""
    try:
        return syscall(_LANDLOCK_CREATE_RULESET, 0, 0, 1)
    except OSError:
        return 0


def landlock(read: Iterable[str], write: Iterable[str]) -> None:
    """Only files beneath ``read`` may be read, only those beneath ``write`` changed; no TCP, no abstract sockets, no
    signals to others, as far as this kernel's version covers them. Paths that do not exist are left out."""
    abi = landlock_abi()
    if abi < 1:
        raise OSError(38, "this kernel has no Landlock")
    rights = _ALL_OF_ABI_1
    rights |= (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0) | (_IOCTL_DEV if abi >= 5 else 0)
    fields = [rights]
    if abi >= 4:
        fields.append(_NET_TCP)
    if abi >= 6:
        fields.append(_SCOPES)
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = syscall(_LANDLOCK_CREATE_RULESET, ctypes.c_char_p(attributes), len(attributes), 0)
    try:
        for paths, allowed in ((read, _EXECUTE | _READ_FILE | _READ_DIR), (write, rights & ~_EXECUTE)):
            for path in paths:
                _allow(ruleset, path, allowed)
        forbid_new_privileges()
        syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, allowed: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            allowed &= _FILE_RIGHTS
        rule = struct.pack("=Qi", allowed, handle)
        syscall(_LANDLOCK_ADD_RULE, ruleset, 1, ctypes.c_char_p(rule), 0)
    finally:
        os.close(handle)


def close_files(keep: Iterable[int]) -> None:
    """Close every file descriptor but these."""
    last = 2
    for fd in sorted(set(keep)):
        if fd > 2:
            os.closerange(last + 1, fd)
            last = fd
    os.closerange(last + 1, 4096)
