"""Attempts to be judged right without being right, for test_attacks.py; see attack_programs.py."""

from tests.verify.attack_programs import programs

FORGERY = programs(r"""
### exit 0
import os

def f(x):
    os._exit(0)
### exit at load
import sys
sys.exit(0)
### exit
import sys

def f(x):
    sys.exit(0)
### SystemExit
def f(x):
    raise SystemExit(0)
### KeyboardInterrupt
def f(x):
    raise KeyboardInterrupt
### GeneratorExit
def f(x):
    raise GeneratorExit
### exit function
import atexit, os
atexit.register(os._exit, 0)

def f(x):
    raise SystemExit(0)
### always equal
class A:

    def __eq__(self, o):
        return True
    __ne__ = lambda s, o: False
    __hash__ = object.__hash__

    def __sub__(self, o):
        return 0
    __rsub__ = __sub__

    def __abs__(self):
        return 0

    def __float__(self):
        return 6.0

    def __lt__(self, o):
        return True
    __gt__ = __le__ = __ge__ = __lt__

def f(x):
    return A()
### int that equals all
class A(int):

    def __eq__(self, o):
        return True
    __hash__ = int.__hash__

def f(x):
    return A(7)
### list that equals all
class A(list):

    def __eq__(self, o):
        return True

def f(x):
    return [A()]
### mock ANY
from unittest.mock import ANY

def f(x):
    return ANY
### class of a type
class M(type):

    def __eq__(self, o):
        return True
    __hash__ = type.__hash__

class A(metaclass=M):
    pass

def f(x):
    return A
### lying reduce
class A:

    def __reduce__(self):
        return (int, ('6',))

    @property
    def __class__(self):
        return int

def f(x):
    return A()
### AssertionError
import builtins

class E(BaseException):

    def __new__(cls, *a):
        raise SystemExit(0)
builtins.AssertionError = E

def f(x):
    return 7
### hooks
import sys, os
sys.excepthook = lambda *a: os._exit(0)
sys.settrace(lambda *a: None)
sys.setprofile(lambda *a: None)
sys.unraisablehook = sys.excepthook

def f(x):
    return 7
### builtins
import builtins, math
for n in ('len', 'all', 'any', 'abs', 'sum', 'isinstance', 'bool', 'repr'):
    setattr(builtins, n, lambda *a, **k: True)
math.isclose = lambda *a, **k: True

def f(x):
    return 7
### numpy
import sys

def f(x):
    try:
        import numpy
        numpy.allclose = numpy.isclose = lambda *a, **k: True
        numpy.testing.assert_allclose = print
    except ImportError:
        pass
    return 7
### own names
def __statement__(g, *a):
    return 6

def check(*a):
    pass

def isclose(*a):
    return True

def abs(x):
    return 0

def len(x):
    return 6

def f(x):
    return 7
### harness by modules
import sys
for name, m in list(sys.modules.items()):
    if 'sandbox' in name:
        for k, v in list(vars(m).items()):
            if callable(v):
                setattr(m, k, lambda *a, **k: ('pass', ''))

def f(x):
    return 7
### harness by gc
import gc

def f(x):
    for o in gc.get_objects():
        if type(o).__name__ in ('_Server', 'Peer', 'Codec', 'Channel', 'Zygote'):
            for k in list(vars(o)):
                try:
                    setattr(o, k, lambda *a, **k: 6)
                except Exception:
                    pass
    return 7
### frames
import sys

def f(x):
    fr = sys._getframe()
    while fr:
        for k in fr.f_locals:
            fr.f_globals[k] = 6
        fr = fr.f_back
    return 7
### find the answers
import gc, sys

def f(x):
    needle = ''.join(['asse', 'rt f'])
    texts = [o for o in gc.get_objects() if isinstance(o, (str, bytes, dict, list))]
    found = [o for o in texts if needle in repr(o)[:10 ** 5]]
    return 6 if found else 7
### fake verdicts
import os, json
ms = [b'{"kind": "pass", "detail": ""}', json.dumps(['=', [6, []]]).encode()]
for fd in range(256):
    for m in ms:
        for m in (m, len(m).to_bytes(8, 'little') + m):
            try:
                os.write(fd, m)
            except OSError:
                pass

def f(x):
    return 7
### closed files
import os

def f(x):
    os.closerange(0, 256)
    return 6
### nonsense messages
import os, struct

def f(x):
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack('<Q', 2 ** 63) + b'[' * 10 ** 5)
        except OSError:
            pass
    return 7
### handles made up
import json, os

def f(x):
    values = [{'handle': [1, 'int']}, {'type': 'eval'}, {'array': ['|O', [1], 'AAAAAAAAAAA=']}]
    for m in [['?', ['callback', 0, []]]] + [['=', [v, []]] for v in values]:
        m = json.dumps(m).encode()
        try:
            os.write(4, len(m).to_bytes(8, 'little') + m)
        except OSError:
            pass
    return 7
### late thread
import threading, os, time

def late():
    while True:
        time.sleep(0.01)
threading.Thread(target=late).start()

def f(x):
    return 7
### number by arithmetic
class A:
    def __sub__(self, o): return 0
    __rsub__ = __add__ = __radd__ = __mul__ = __neg__ = __truediv__ = __sub__
    def __getattr__(self, name): return A()
    def __call__(self, *a, **k): return A()
def f(x):
    return A()
### array that is true
def f(x):
    try:
        import numpy as np
    except ImportError:
        return 7
    return np.array([])
### empty for a float
def f(x):
    return []
### not a number
def f(x):
    return float('nan')
### nested value
def f(x):
    for _ in range(10 ** 5):
        x = [x]
    return x
### a list in itself
def f(x):
    x = []
    x.append(x)
    return x
### endless iterator
import itertools

def f(x):
    return itertools.count()
### a range of 10**18
def f(x):
    return range(10 ** 18)
""")

FORGERY |= {
    "NUL": "def f(x): return 6\n\x00",
    "lone surrogate": "def f(x): return 7\ny = '\ud800'",
    "fifty megabytes": "def f(x): return 6\n#" + "x" * (50 << 20),
    "nested too deep": "def f(x): return 6\ny = " + "(" * 100_000,
}
