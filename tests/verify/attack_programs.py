"""Attacks on the machine, for attack_runner.py. Each defines ``attack()`` and reports what it reached.

``tried(action)`` runs an action and notes what came of it where it was not refused; ``f(x)``, which the tests call,
returns the notes. An attack is repelled when its notes are empty, or when the kernel killed it for trying. One that
only ran until its time was over proves nothing.

Upper-case words are put in by the runner: SECRET (a file's path), HOME (a folder), PORT (of a TCP listener), SOCKET
(an abstract socket's name), PARENT (a pid), TOKEN (what must not turn up anywhere afterwards).
"""

import platform

PRELUDE = """
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

# name | what a run may end as | what its answer must be. "pass" stands for: it ran to its end, and that was the answer.
# A time-out is repelled only where there is no other end.
RESOURCES = {
    name: program
    for name, program in programs(
        r"""
### fork bomb | violation
import os

def f(x):
    while True:
        os.fork()
### endless output | timeout
import sys

def f(x):
    while True:
        print('x' * 10 ** 6)
### endless errors | timeout
import os

def f(x):
    while True:
        os.write(2, b'x' * 10 ** 6)
### ten gigabytes | memory runtime_error
def f(x):
    return len(bytearray(10 ** 10))
### memory bit by bit | memory runtime_error
def f(x):
    xs = []
    while True:
        xs.append(' ' * 10 ** 6)
### memory caught | pass memory | 0 < f(3) < 420
def f(x):
    xs = []
    for _ in range(2000):
        try:
            xs.append(' ' * 10 ** 6)
        except MemoryError:
            return len(xs)
    return len(xs)
### threads | pass | 8 < f(3) < THREADS
import _thread, threading

def f(x):
    threading.stack_size(32768)
    hold, started = threading.Event(), 0
    try:
        for started in range(4000):
            _thread.start_new_thread(hold.wait, ())  # waits for no thread that memory keeps from starting
    except RuntimeError:
        pass
    return started
### threads by number | pass | 8 < f(3) < THREADS
import ctypes, mmap

def f(x):
    # Two pieces of machine code for x86-64: clone(flags, stack) and return; and pause for ever, which is what the new
    # thread returns into.
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes([0xb8, 56, 0, 0, 0, 0x0f, 0x05, 0xc3]) + bytes([0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7]))
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    clone = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong)(start)
    stacks = mmap.mmap(-1, 4000 * 64)
    globals()['kept'] = page, stacks  # threads may begin after this function has ended
    top = ctypes.addressof(ctypes.c_char.from_buffer(stacks))
    for started in range(4000):
        place = top + 64 * started + 48
        ctypes.c_uint64.from_address(place).value = start + 8
        if clone(0x50f00, place) < 0:
            break
    return started
### pipes | pass | f(3) < 128
import os

def f(x):
    count = 0
    try:
        while True:
            os.pipe()
            count += 1
    except OSError:
        return count
### memory files | runtime_error violation
import os

def f(x):
    return os.memfd_create('TOKEN')
### shared memory | runtime_error memory
import mmap

def f(x):
    return [mmap.mmap(-1, 10 ** 8) for _ in range(200)]
### endless recursion | runtime_error memory
import sys
sys.setrecursionlimit(10 ** 6)

def f(x):
    return f(x) + 1
### recursion in C | runtime_error memory
def f(x):
    for _ in range(4 * 10 ** 6):
        x = (x,)
    return hash(x)
### stops itself | timeout
import os, signal

def f(x):
    os.kill(os.getpid(), signal.SIGSTOP)
### ignores signals | timeout
import signal
for s in range(1, 65):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass

def f(x):
    while True:
        pass
### huge exception | runtime_error memory
def f(x):
    raise ValueError('x' * 10 ** 8)
### exception that fights | runtime_error
class E(Exception):

    def __str__(self):
        raise E()
    __repr__ = __str__

def f(x):
    raise E()
### a big file | pass violation | f(3) <= 64 << 20
def f(x):
    written = 0
    try:
        with open('big', 'wb', buffering=0) as file:
            for _ in range(10 ** 5):
                written += file.write(b'x' * 10 ** 6)
    except OSError:
        pass
    return written
### many big files | pass violation | f(3) <= 64 << 20
def f(x):
    written = 0
    try:
        for i in range(10 ** 5):
            with open(f'{i}', 'wb', buffering=0) as file:
                written += file.write(b'x' * 10 ** 6)
    except OSError:
        pass
    return written
### many files | pass | f(3) <= 1024
import os

def f(x):
    count = 0
    try:
        for count in range(10 ** 5):
            os.close(os.open(f'{count}', os.O_CREAT | os.O_WRONLY))
    except OSError:
        pass
    return count
"""
    ).items()
    if platform.machine() == "x86_64" or "by number" not in name
}
