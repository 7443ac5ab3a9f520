"""Attacks on the machine, for attack_runner.py. Each defines ``attack()`` and reports what it reached.

``tried(action)`` runs an action and notes what came of it where it was not refused; ``f(x)``, which the tests call,
returns the notes. An attack is repelled when its notes are empty, or when the kernel killed it for trying. One that
only ran until its time was over proves nothing.

Upper-case words are put in by the runner: SECRET (a file's path), HOME (a folder), PORT (of a TCP listener), SOCKET
(an abstract socket's name), PARENT (a pid), TOKEN (what must not turn up anywhere afterwards).
"""

PRELUDE = """
import os as _os
X86 = _os.uname().machine == 'x86_64'
NAMESPACES = not _os.path.exists('/proc/self')
reached = []

def tried(action, *args):
    try:
        got = action(*args)
    except Exception as error:
        return error
    reached.append(f'{args}: {got!r}'[:200])

def f(x):
    attack()
    return reached
"""


def programs(text: str, prelude: str = "") -> dict[str, str]:
    parts = text.strip().split("\n### ")
    named = (part.removeprefix("### ").partition("\n") for part in parts)
    return {name: f"{prelude}{body}\n" for name, _, body in named}


REACHING_OUT = programs(
    r"""
### read a secret
def attack():
    tried(lambda: open('SECRET').read())
### list a folder
import os

def attack():
    for place in ('HOME', '/home', '/root', '/etc', '/proc', '/sys'):
        tried(os.listdir, place)
### read by link
import os

def attack():
    tried(lambda: (os.symlink('SECRET', 'l'), open('l').read()))
### read by hard link
import os

def attack():
    tried(lambda: (os.link('SECRET', 'l'), open('l').read()))
### read through descriptors
import os

def attack():
    for fd in range(256):
        tried(lambda: open(f'/proc/self/fd/{fd}/../../../../../../../../../SECRET').read(99))
        tried(lambda: os.open('SECRET', 0, dir_fd=fd))
### other descriptors than its own
import os

def attack():
    for fd in range(5, 256):
        tried(os.fstat, fd)
### chroot away
import os

def attack():
    tried(lambda: (os.chroot('.'), os.chdir('../../../..'), open('SECRET').read()))
### environment
import os, ctypes

def attack():
    c = ctypes.CDLL(None)
    c.getenv.restype = ctypes.c_char_p
    if os.environ or c.getenv(b'ATTACK_TOKEN'):
        reached.append(dict(os.environ))
### parent's memory
import os

def attack():
    for pid in (PARENT, os.getppid(), 1, 'self', 'thread-self'):
        for name in ('environ', 'mem', 'maps', 'cmdline', 'root/etc/passwd'):
            tried(lambda: open(f'/proc/{pid}/{name}', 'rb').read(50))
### write home
import os

def attack():
    for place in ('HOME', '/var/tmp', '/dev/shm', '/', '/usr/lib', '/run'):
        tried(open, f'{place}/TOKEN', 'w')
        tried(os.mkdir, f'{place}/TOKEN-d')
### change modes
import os

def attack():
    for change in (lambda p: os.chmod(p, 0o777), lambda p: os.truncate(p, 0), os.unlink, lambda p: os.utime(p, (1, 1)),
                   lambda p: os.chown(p, 0, 0), lambda p: os.setxattr(p, 'user.x', b''),
                   lambda p: os.rename(p, p + 'x'), lambda p: os.open(p, os.O_RDONLY | os.O_TRUNC)):
        tried(change, 'SECRET')
### connect
import socket

def attack():
    tried(lambda: socket.create_connection(('127.0.0.1', PORT), 1).send(b'TOKEN'))
### connect by number
import ctypes, struct

def attack():
    c = ctypes.CDLL(None)
    s = c.syscall(41, 2, 1, 0)
    if c.syscall(42, s, struct.pack('>HH4s8x', 512, PORT, b'\x7f\x00\x00\x01'), 16) == 0:
        reached.append(s)
### abstract socket
import socket

def attack():
    tried(lambda: socket.socket(socket.AF_UNIX).connect('\x00SOCKET'))
### pair to abstract socket
import socket

def attack():
    tried(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'TOKEN', '\x00SOCKET-d'))
### stream pair to socket
import socket

def attack():
    a, b = socket.socketpair()
    tried(a.sendto, b'TOKEN', '\x00SOCKET')
    tried(a.connect, '\x00SOCKET')
### kill the parent
import os

def attack():
    for pid in (PARENT, os.getppid(), 1, -1, 0):
        tried(os.kill, pid, 9)
### kill by descriptor
import signal, os

def attack():
    tried(lambda: signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9))
### kill by owner of a pipe
import fcntl, os

def attack():
    r, w = os.pipe()
    tried(fcntl.fcntl, r, 10, 9)
    tried(fcntl.fcntl, r, 8, os.getppid())
### limits of the parent
import resource, os

def attack():
    tried(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (0, 0))
### own limits
import resource

def attack():
    for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
        before = resource.getrlimit(which)
        for limits in ((-1, -1), (before[1] + 1, before[1] + 1)):
            try:
                resource.setrlimit(which, limits)
                resource.prlimit(0, which, limits)
            except (OSError, ValueError):
                pass
        if resource.getrlimit(which)[1] != before[1]:
            reached.append(resource.getrlimit(which))
### ptrace
import ctypes, os

def attack():
    reached.append(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))
### other's memory
import ctypes, os

def attack():
    reached.append(ctypes.CDLL(None).syscall(310, os.getppid(), 0, 0, 0, 0, 0))
### user namespace
import ctypes

def attack():
    reached.append(ctypes.CDLL(None).unshare(268435456))
### mount
import ctypes

def attack():
    reached.append(ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None))
### io_uring
import ctypes

def attack():
    reached.append(ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)))
### file handles
import ctypes

def attack():
    reached.append(ctypes.CDLL(None).syscall(304, 3, ctypes.create_string_buffer(128), 0))
### run a program
import subprocess

def attack():
    tried(subprocess.run, ['/bin/sh', '-c', 'touch HOME/TOKEN'])
### exec
import os

def attack():
    tried(os.execv, '/bin/sh', ['sh', '-c', 'touch HOME/TOKEN'])
### daemon
import os

def attack():
    tried(os.fork)
### clone by number
import ctypes

def attack():
    c = ctypes.CDLL(None)
    reached.extend(n for n in (c.syscall(56, 17, 0, 0, 0, 0), c.syscall(57), c.syscall(435, 0, 88)) if n >= 0)
### another user
import os

def attack():
    before = os.getresuid()
    for change in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: os.setresuid(0, 0, 0)):
        try:
            change()
        except OSError:
            pass
    if os.getresuid() != before:
        reached.append(os.getresuid())
### capabilities
import ctypes

def attack():
    head = ctypes.create_string_buffer(b'\x22\x05\x08\x20' + bytes(4))
    for bits in (0xffffffff, 1 << 21, 1 << 7, 1 << 1):
        data = (ctypes.c_uint * 6)(bits, bits, 0, 0xffffffff, 0xffffffff, 0)
        if ctypes.CDLL(None).capset(head, data) == 0:
            reached.append(bits)
### change the libraries
import json, os

def attack():
    for path in (os.__file__, json.__file__, os.path.dirname(os.__file__) + '/TOKEN'):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
            tried(os.open, path, flags)
        tried(os.utime, path)
        tried(os.chmod, path, 0o666)
        tried(os.rename, path, path + '.TOKEN')
        tried(os.unlink, path)
        tried(os.symlink, path, path + '.TOKEN')
### map a library to write to it
import mmap, os

def attack():
    fd = os.open(os.__file__, os.O_RDONLY)
    tried(lambda: mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE))
### attributes of files
import os

def attack():
    for path in ('SECRET', os.__file__):
        tried(os.setxattr, path, 'user.x', b'1')
        tried(os.removexattr, path, 'user.x')
        tried(os.getxattr, path, 'user.x')
        tried(os.listxattr, path)
### lock a library
import fcntl, os, struct

def attack():
    if NAMESPACES:  # there a lock is a program's own business: its folder is its own
        return
    fd = os.open(os.__file__, os.O_RDONLY)
    whole = struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0)
    for command in (fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_GETLK, 36, 37):
        tried(fcntl.fcntl, fd, command, whole)
    tried(fcntl.flock, fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
### watch files
import ctypes

def attack():
    c = ctypes.CDLL(None)
    reached.extend(n for n in (c.inotify_init(), c.inotify_init1(0), c.fanotify_init(0, 0)) if n >= 0)
### shared memory of System V and of POSIX
import ctypes

def attack():
    c = ctypes.CDLL(None)
    flags = 0o1600
    reached.extend(n for n in (c.shmget(0, 4096, flags), c.semget(0, 1, flags), c.msgget(0, flags)) if n >= 0)
    for name in (b'/TOKEN', b'TOKEN'):
        if c.mq_open(name, 0o102, 0o600, None) >= 0 or c.shm_open(name, 0o102, 0o600) >= 0:
            reached.append(name)
### sockets of every family
import socket

def attack():
    for family in range(46):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            tried(socket.socket, family, kind, 0)
### pass descriptors on
import array, socket

def attack():
    a, b = socket.socketpair()
    tried(a.sendmsg, [b'x'], [(1, 1, array.array('i', [0]))])
    tried(b.recvmsg, 9, 99)
### priorities and cores of others
import os

def attack():
    for pid in (PARENT, os.getppid(), 0):
        tried(os.setpriority, os.PRIO_PROCESS, pid, -5)
        tried(os.sched_setaffinity, pid, {0})
        tried(os.sched_setscheduler, pid, os.SCHED_BATCH, os.sched_param(0))
    tried(os.nice, 1)
### sessions and groups of processes
import os

def attack():
    tried(os.setpgid, 0, PARENT)
    tried(os.setsid)
    tried(os.killpg, 0, 0)
### give the filter away
import ctypes

def attack():
    c = ctypes.CDLL(None)
    if c.syscall(317, 1, 0, 0) >= 0 or c.prctl(22, 1, 0, 0, 0) >= 0 or c.prctl(4, 1, 0, 0, 0) >= 0:
        reached.append('seccomp or dumpable')
    if c.prctl(8, 1, 0, 0, 0) >= 0 or c.prctl(36, 1, 0, 0, 0) >= 0 or c.prctl(23, 0, 0, 0, 0) > 0:
        reached.append('prctl')
    if c.syscall(444, 0, 0, 1) >= 0:
        reached.append('landlock')
### another architecture's calls
import ctypes, mmap

def attack():
    if X86:
        # fork() as 32-bit code asks for it: mov eax, 2; int 0x80; ret
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes([0xb8, 2, 0, 0, 0, 0xcd, 0x80, 0xc3]))
        call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        if call() >= 0:
            reached.append('int 0x80')
### calls of the x32 interface
import ctypes

def attack():
    if X86 and ctypes.CDLL(None).syscall(0x40000000 + 57) >= 0:
        reached.append('x32')
### its own memory by name
def attack():
    for name in ('mem', 'environ', 'maps', 'root/etc/passwd', 'cwd/SECRET', 'attr/current', 'oom_score_adj'):
        tried(lambda: open(f'/proc/self/{name}', 'rb').read(9))
        tried(lambda: open(f'/proc/thread-self/{name}', 'r+b').write(b'0'))
### devices
import os

def attack():
    for name in ('mem', 'kmsg', 'tty', 'ptmx', 'fuse', 'kvm', 'shm', 'loop-control', 'nvidia0', 'net/tun'):
        tried(os.open, f'/dev/{name}', os.O_RDWR)
    tried(os.openpty)
    tried(os.mknod, 'TOKEN', 0o20600, os.makedev(1, 1))
### cleanup trap
import os

def attack():
    for action in (lambda: os.makedirs('a/b'), lambda: os.symlink('HOME', 'a/b/out'),
                   lambda: os.symlink('SECRET', 'a/s'),
                   lambda: os.chmod('a/b', 0), lambda: os.chmod('a', 0), lambda: os.chmod('.', 0)):
        try:
            action()
        except OSError:
            pass
""",
    PRELUDE,
)
