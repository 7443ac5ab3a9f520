"""Attacks on the machine, for test_attacks.py: programs that define ``f``. Right would be f(3) == 6.

Upper-case words are put in by the test: SECRET (a file's path), HOME (a folder), PORT (of a TCP listener), SOCKET (an
abstract socket's name), PARENT (a pid), TOKEN (what must not turn up anywhere afterwards).
"""


def programs(text: str) -> dict[str, str]:
    parts = text.strip().split("\n### ")
    return {name.removeprefix("### "): body + "\n" for name, _, body in (part.partition("\n") for part in parts)}


RESOURCES = programs(r"""
### fork bomb
import os

def f(x):
    while True:
        os.fork()
### clone by number
import ctypes

def f(x):
    c = ctypes.CDLL(None)
    return [c.syscall(56, 17, 0, 0, 0, 0), c.syscall(57), c.syscall(435, 0, 88)]
### endless output
import sys

def f(x):
    while True:
        print('x' * 10 ** 6)
### endless errors
import os

def f(x):
    while True:
        os.write(2, b'x' * 10 ** 6)
### ten gigabytes
def f(x):
    return len(bytearray(10 ** 10))
### memory bit by bit
def f(x):
    xs = []
    while True:
        xs.append(' ' * 10 ** 6)
### memory caught
def f(x):
    xs = []
    while True:
        try:
            xs.append(' ' * 10 ** 6)
        except MemoryError:
            pass
### threads
import threading, time

def f(x):
    threading.stack_size(32768)
    while True:
        threading.Thread(target=time.sleep, args=(99,)).start()
### pipes
import os

def f(x):
    while True:
        os.pipe()
### memory files
import os

def f(x):
    return os.memfd_create('TOKEN')
### shared memory
import mmap

def f(x):
    return [mmap.mmap(-1, 10 ** 8) for _ in range(200)]
### endless recursion
import sys
sys.setrecursionlimit(10 ** 9)

def f(x):
    return f(x) + 1
### recursion in C
import sys
sys.setrecursionlimit(10 ** 9)

def f(x):
    for _ in range(10 ** 7):
        x = [x]
    return repr(x)
### stops itself
import os, signal

def f(x):
    os.kill(os.getpid(), signal.SIGSTOP)
### ignores signals
import signal
for s in range(1, 65):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass

def f(x):
    while True:
        pass
### huge exception
def f(x):
    raise ValueError('x' * 10 ** 8)
### exception that fights
class E(Exception):

    def __str__(self):
        raise E()
    __repr__ = __str__

def f(x):
    raise E()
### a big file
def f(x):
    with open('big', 'wb') as file:
        for _ in range(10 ** 5):
            file.write(b'x' * 10 ** 6)
### many big files
def f(x):
    for i in range(10 ** 5):
        with open(f'{i}', 'wb') as file:
            file.write(b'x' * 10 ** 6)
### many files
import os

def f(x):
    for i in range(10 ** 7):
        os.close(os.open(f'{i}', os.O_CREAT | os.O_WRONLY))
""")

REACHING_OUT = programs(r"""
### read a secret
def f(x):
    return open('SECRET').read()
### read by link
import os

def f(x):
    os.symlink('SECRET', 'l')
    return open('l').read()
### read by hard link
import os

def f(x):
    os.link('SECRET', 'l')
    return open('l').read()
### read through descriptors
import os

def f(x):
    out = []
    for fd in range(256):
        for flags in ('', '/../' * 9 + 'SECRET'):
            try:
                out.append(open(f'/proc/self/fd/{fd}{flags}').read(99))
            except Exception:
                pass
            try:
                out.append(os.open('SECRET', 0, dir_fd=fd))
            except Exception:
                pass
    return out
### chroot away
import os

def f(x):
    os.chroot('.')
    os.chdir('../../../..')
    return open('SECRET').read()
### environment
import os, ctypes

def f(x):
    c = ctypes.CDLL(None)
    c.getenv.restype = ctypes.c_char_p
    return [dict(os.environ), c.getenv(b'ATTACK_TOKEN')]
### parent's memory
import os

def f(x):
    out = []
    for pid in (PARENT, os.getppid(), 1, 'self', 'thread-self'):
        for name in ('environ', 'mem', 'maps', 'cmdline', 'root/etc/passwd'):
            try:
                out.append(open(f'/proc/{pid}/{name}', 'rb').read(50))
            except Exception:
                pass
    return out or 'nothing'
### write home
import os

def f(x):
    for place in ('HOME', '/tmp', '/var/tmp', '/dev/shm', '/', '/usr/lib', '/run'):
        try:
            open(f'{place}/TOKEN', 'w').write('x')
        except OSError:
            pass
        try:
            os.mkdir(f'{place}/TOKEN-d')
        except OSError:
            pass
### change modes
import os

def f(x):
    changes = [lambda p: os.chmod(p, 0o777), lambda p: os.truncate(p, 0), os.unlink, lambda p: os.utime(p, (1, 1))]
    changes += [lambda p: os.rename(p, p + 'x'), lambda p: os.open(p, os.O_RDONLY | os.O_TRUNC)]
    for g in changes:
        try:
            g('SECRET')
        except OSError:
            pass
### connect
import socket

def f(x):
    socket.create_connection(('127.0.0.1', PORT), 1).send(b'TOKEN')
### connect by number
import ctypes, struct

def f(x):
    c = ctypes.CDLL(None)
    s = c.syscall(41, 2, 1, 0)
    return c.syscall(42, s, struct.pack('>HH4s8x', 512, PORT, b'\x7f\x00\x00\x01'), 16)
### abstract socket
import socket

def f(x):
    s = socket.socket(socket.AF_UNIX)
    s.connect('\x00SOCKET')
    s.send(b'TOKEN')
### pair to abstract socket
import socket

def f(x):
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    a.sendto(b'TOKEN', '\x00SOCKET')
### stream pair to socket
import socket

def f(x):
    a, b = socket.socketpair()
    a.sendto(b'TOKEN', '\x00SOCKET')
    a.connect('\x00SOCKET')
### kill the parent
import os

def f(x):
    for pid in (PARENT, os.getppid(), 1, -1, 0):
        os.kill(pid, 9)
### kill by descriptor
import signal, os

def f(x):
    signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)
### kill by owner of a pipe
import fcntl, os

def f(x):
    r, w = os.pipe()
    fcntl.fcntl(r, 10, 9)
    fcntl.fcntl(r, 8, os.getppid())
### limits of the parent
import resource, os

def f(x):
    resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))
### own limits
import resource

def f(x):
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
### ptrace
import ctypes, os

def f(x):
    return ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
### other's memory
import ctypes, os

def f(x):
    return ctypes.CDLL(None).syscall(310, os.getppid(), 0, 0, 0, 0, 0)
### user namespace
import ctypes

def f(x):
    return ctypes.CDLL(None).unshare(268435456)
### mount
import ctypes

def f(x):
    return ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None)
### io_uring
import ctypes

def f(x):
    return ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120))
### run a program
import subprocess

def f(x):
    return subprocess.run(['/bin/sh', '-c', 'touch HOME/TOKEN'])
### exec
import os

def f(x):
    os.execv('/bin/sh', ['sh', '-c', 'touch HOME/TOKEN'])
### preload
import os, ctypes

def f(x):
    open('x.so', 'wb').write(b'\x7fELF')
    os.environ['LD_PRELOAD'] = './x.so'
    os.execv('/bin/true', ['true'])
### daemon
import os

def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                pass
    return 6
### setuid
import os

def f(x):
    os.setuid(0)
    return open('SECRET').read()
### new namespace by proc
import os

def f(x):
    return os.listdir('/proc')
### cleanup trap
import os

def f(x):
    os.makedirs('a/b')
    os.symlink('HOME', 'a/b/out')
    os.symlink('SECRET', 'a/s')
    os.chmod('a/b', 0)
    os.chmod('a', 0)
    os.chmod('.', 0)
""")
