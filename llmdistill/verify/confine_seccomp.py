"""The system calls a confined process may make, as a seccomp filter.

An allow-list: what is not named fails with EPERM, so that a call of a future kernel is shut too. Calls that only an
attack (or a program that cannot work here anyway: subprocess, multiprocessing) makes kill the process with SIGSYS,
which the parent reports as a violation. Sockets fail softly, because harmless libraries try them and go on.

The tables hold name:number on x86_64:number on aarch64 (include/uapi/asm-generic/unistd.h and the x86 table).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from llmdistill.verify.confine import forbid_new_privileges, prctl

_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000  # SECCOMP_RET_KILL_PROCESS, _ALLOW, _ERRNO
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2

# Classic BPF: (code, jump if true, jump if false, constant)
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NUMBER, _ARCH = 0, 4

Instruction = tuple[int, int, int, int]


def _table(text: str) -> dict[str, tuple[int | None, int | None]]:
    rows = (entry.split(":") for entry in text.split())
    return {name: (_number(x86), _number(arm)) for name, x86, arm in rows}


def _number(text: str) -> int | None:
    return None if text == "-" else int(text)


_USE = _table("""
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
    preadv2:327:286 pwritev2:328:287 lseek:8:62 close:3:57 close_range:436:436 open:2:- openat:257:56 stat:4:-
    fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44 access:21:-
    faccessat:269:48 faccessat2:439:439 readlink:89:- readlinkat:267:78 getcwd:79:17 chdir:80:49 fchdir:81:50
    getdents:78:- getdents64:217:61 umask:95:166 fsync:74:82 fdatasync:75:83 fadvise64:221:223
    copy_file_range:326:285 sendfile:40:71 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 poll:7:-
    ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232:- epoll_pwait:281:22 eventfd:284:- eventfd2:290:19 signalfd4:289:74 timerfd_create:283:85
    timerfd_settime:286:86 timerfd_gettime:287:87 ftruncate:77:46 mmap:9:222 munmap:11:215 mprotect:10:226
    mremap:25:216 madvise:28:233 brk:12:214 msync:26:227 mincore:27:232 futex:202:98 futex_waitv:449:449
    set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 membarrier:324:283 set_tid_address:218:96
    sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
    sched_get_priority_max:146:125 sched_get_priority_min:147:126 getcpu:309:168 exit:60:93 exit_group:231:94
    restart_syscall:219:128 arch_prctl:158:- rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
    rt_sigpending:127:136 rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132 pause:34:-
    alarm:37:- getitimer:36:102 setitimer:38:103 timer_create:222:107 timer_settime:223:110
    timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111 nanosleep:35:101 clock_nanosleep:230:115
    clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:- times:100:153 getpid:39:172
    getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177
    getresuid:118:148 getresgid:120:150 getgroups:115:158 getpgrp:111:- getpgid:121:155 getsid:124:156
    getrlimit:97:163 getrusage:98:165 getpriority:140:141 uname:63:160 sysinfo:99:179 capget:125:90
    getrandom:318:278 wait4:61:260 waitid:247:95 sendto:44:206 recvfrom:45:207 getsockname:51:204
    getpeername:52:205 getsockopt:55:209 shutdown:48:210
""")

_CHANGE = _table("""
    creat:85:- rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:-
    unlinkat:263:35 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 chmod:90:- fchmod:91:52
    fchmodat:268:53 chown:92:- fchown:93:55 lchown:94:- fchownat:260:54 utime:132:- utimes:235:-
    utimensat:280:88 futimesat:261:- truncate:76:45 fallocate:285:47 flock:73:32
""")

_BREACH = _table("""
    fork:57:- vfork:58:- execve:59:221 execveat:322:281 ptrace:101:117 process_vm_readv:310:270
    process_vm_writev:311:271 process_madvise:440:440 kcmp:312:272 tkill:200:130 rt_sigqueueinfo:129:138
    rt_tgsigqueueinfo:297:240 pidfd_open:434:434 pidfd_send_signal:424:424 pidfd_getfd:438:438 mount:165:40
    umount2:166:39 pivot_root:155:41 chroot:161:51 mount_setattr:442:442 move_mount:429:429 open_tree:428:428
    fsopen:430:430 fsconfig:431:431 fsmount:432:432 unshare:272:97 setns:308:268 bpf:321:280
    io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427 userfaultfd:323:282
    perf_event_open:298:241 add_key:248:217 request_key:249:218 keyctl:250:219 init_module:175:105
    finit_module:313:273 delete_module:176:106 kexec_load:246:104 reboot:169:142 swapon:167:224 swapoff:168:225
    open_by_handle_at:304:265 iopl:172:- ioperm:173:- quotactl:179:60 acct:163:89 settimeofday:164:170
    clock_settime:227:112 sethostname:170:161 setdomainname:171:162
""")

_SPECIAL = _table("""
    clone:56:220 clone3:435:435 openat2:437:437 kill:62:129 tgkill:234:131 socket:41:198 socketpair:53:199
    fcntl:72:25 ioctl:16:29 prctl:157:167 prlimit64:302:261
""")

# ioctl requests that only ask about or set flags of a file of one's own: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO,
# FIONCLEX, FIOCLEX. TIOCSTI and the like stay shut.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# fcntl commands that make the kernel signal somebody or hold memory: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE,
# F_NOTIFY, F_SETPIPE_SZ.
_FCNTLS_SHUT = (8, 10, 15, 1024, 1026, 1031)
_LOCKS = (5, 6, 7, 36, 37, 38)  # F_GETLK, F_SETLK, F_SETLKW and those of open file descriptions
_PRCTLS = (15, 16, 3, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_GET_DUMPABLE, PR_SET_VMA
_AF_UNIX, _SOCK_STREAM_WITH_FLAGS = 1, (1, 1 | os.O_CLOEXEC, 1 | os.O_NONBLOCK, 1 | os.O_CLOEXEC | os.O_NONBLOCK)
_CLONE_THREAD = 0x10000


def supported() -> bool:
    """Whether this kernel filters system calls and we know its numbers."""
    if sys.platform != "linux" or os.uname().machine not in _ARCHITECTURES or sys.byteorder != "little":
        return False
    try:
        return prctl(21) in (0, 2)  # PR_GET_SECCOMP
    except OSError:
        return False


def filter_system_calls(*, may_change_files: bool, may_truncate: bool = True) -> None:
    """Install the filter in this process and its later threads, for good. Raises OSError where the kernel refuses.

    Args:
        may_change_files: whether calls that create, rename or remove files or change their modes go through (to be
            judged by the file system). Landlock knows nothing of chmod, chown, utime and locks: without a root
            directory of its own a process must not have them.
        may_truncate: whether open(O_TRUNC) goes through; Landlock before ABI 3 does not see it.
    """
    program = _program(os.uname().machine, os.getpid(), may_change_files, may_truncate)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    head_buffer = ctypes.create_string_buffer(head, len(head))
    forbid_new_privileges()
    prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(head_buffer))


def _program(machine: str, pid: int, may_change_files: bool, may_truncate: bool) -> list[Instruction]:
    column = 0 if machine == "x86_64" else 1

    def numbers(table: dict[str, tuple[int | None, int | None]]) -> dict[str, int]:
        return {name: number for name, both in table.items() if (number := both[column]) is not None}

    refuse = _ERRNO | errno.EPERM
    special = numbers(_SPECIAL)
    out: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # the x32 interface has numbers of its own
        (_RETURN, 0, 0, _KILL),
    ]

    def rule(name: str, body: list[Instruction]) -> None:
        if name in special:
            out.extend([(_EQUAL, 0, len(body), special[name]), *body])

    if not may_truncate:
        for name, argument in (("open", 1), ("openat", 2)):
            both = _USE[name][column]
            if both is not None:
                body = [*_argument(argument), (_ANY_BIT, 0, 1, os.O_TRUNC), (_RETURN, 0, 0, refuse)]
                out.extend([(_EQUAL, 0, len(body) + 1, both), *body, (_RETURN, 0, 0, _ALLOW)])
    for number in numbers(_USE).values():
        out.extend([(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)])
    for number in numbers(_CHANGE).values():
        out.extend([(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW if may_change_files else refuse)])
    for number in numbers(_BREACH).values():
        out.extend([(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _KILL)])

    no_such_call = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    rule("clone3", [no_such_call])  # its flags lie in memory, out of sight; the C library falls back to clone
    rule("openat2", [no_such_call])
    rule("clone", [*_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _KILL)])
    for name in ("kill", "tgkill"):  # itself only: abort() and raise_signal() work, nobody else can be reached
        rule(name, [*_one_of(0, (pid,), _ALLOW), (_RETURN, 0, 0, _KILL)])
    rule("prlimit64", [*_one_of(0, (0, pid), _ALLOW), (_RETURN, 0, 0, _KILL)])
    rule("socket", [(_RETURN, 0, 0, refuse)])
    # asyncio wakes itself through a connected pair; such a pair cannot be pointed at anybody else.
    pair = _one_of(1, _SOCK_STREAM_WITH_FLAGS, _ALLOW)
    rule("socketpair", [*_argument(0), (_EQUAL, 0, len(pair), _AF_UNIX), *pair, (_RETURN, 0, 0, refuse)])
    shut = _FCNTLS_SHUT if may_change_files else _FCNTLS_SHUT + _LOCKS
    rule("fcntl", [*_one_of(1, shut, refuse), (_RETURN, 0, 0, _ALLOW)])
    rule("ioctl", [*_one_of(1, _IOCTLS, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.ENOTTY)])
    rule("prctl", [*_one_of(0, _PRCTLS, _ALLOW), (_RETURN, 0, 0, refuse)])
    out.append((_RETURN, 0, 0, refuse))
    return out


def _argument(index: int) -> list[Instruction]:
    """Load the low half of a system call's argument. All those looked at are ints to the kernel."""
    return [(_LOAD, 0, 0, 16 + 8 * index)]


def _one_of(index: int, values: tuple[int, ...], verdict: int) -> list[Instruction]:
    out = _argument(index)
    for value in values:
        out.extend([(_EQUAL, 0, 1, value), (_RETURN, 0, 0, verdict)])
    return out
