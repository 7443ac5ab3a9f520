"""Attacks that want more than their share, for attack_runner.py: time, memory, files, threads."""

import platform

from tests.verify.attack_programs import programs

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
