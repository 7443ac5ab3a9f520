"""Forgeries by what f(x) is, or returns: objects that lie about themselves, and data that oracles may not expect."""

from tests.verify.attack_programs import programs

ANSWERS = programs(r"""
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
### says yes to everything
class A:
    def __getattribute__(self, name):
        return lambda *a, **k: True
    def __bool__(self): return True
    def __len__(self): return 1
    def __iter__(self): return iter([6])
    def __contains__(self, x): return True
    def __getitem__(self, key): return 7
    def __str__(self): return '6'
    __repr__ = __str__
    def __index__(self): return 6
    __int__ = __trunc__ = __round__ = __floor__ = __ceil__ = __index__
    def __float__(self): return 6.0
    def __complex__(self): return 6 + 0j

def f(x):
    return A()
### exact subclasses that lie
class I(int):
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True
    __hash__ = int.__hash__
    __int__ = __index__ = __round__ = __trunc__ = lambda s, *a: 6
    __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = lambda s, o: 0
    __repr__ = __str__ = lambda s: '6'
    __reduce_ex__ = lambda s, p: (int, (6,))
    __class__ = property(lambda s: bool)

def f(x):
    return I(7)
### a float that lies
class F(float):
    __eq__ = __ne__ = lambda s, o: True
    __hash__ = float.__hash__
    __float__ = lambda s: 6.0
    __sub__ = __rsub__ = __abs__ = lambda s, *a: 0.0
    is_integer = lambda s: True
    as_integer_ratio = lambda s: (6, 1)

def f(x):
    return F(7)
### texts and containers that lie
lie = dict(__eq__=lambda s, o: True, __ne__=lambda s, o: False, __hash__=lambda s: hash(6), __len__=lambda s: 1,
           __iter__=lambda s: iter([6]), __getitem__=lambda s, k: 6, __contains__=lambda s, o: True,
           __sub__=lambda s, o: 0, __rsub__=lambda s, o: 0, __abs__=lambda s: 0, keys=lambda s: [6])
made = [type(b.__name__, (b,), lie)() for b in (str, list, tuple, dict, set, frozenset, bytes, bytearray, float)]
turn = 0

def f(x):
    global turn
    turn += 1
    return made[turn % len(made)]
### an array that lies
import sys

def f(x):
    try:
        import numpy as np
    except ImportError:
        return 7
    lie = dict(__eq__=lambda s, o: True, all=lambda s: True, __array__=lambda s, *a: np.array(6),
               __bool__=lambda s: True, __array_priority__=1e9, __array_ufunc__=lambda *a, **k: True,
               __sub__=lambda s, o: 0, __array_function__=lambda *a, **k: True)
    return np.zeros((1,)).view(type('A', (np.ndarray,), lie))
### arrays of no size
turn = 0

def f(x):
    global turn
    turn += 1
    try:
        import numpy as np
    except ImportError:
        return 7
    return [np.zeros((0, 1)), np.zeros((0,)), np.zeros((1, 0)), np.array(None), np.zeros((2, 0), 'f2')][turn % 5]
### odd numbers
import decimal, fractions
odd = [decimal.Decimal('sNaN'), decimal.Decimal('NaN'), decimal.Decimal('Infinity'), float('inf'), complex('nan'), -0.0,
       complex('inf'), fractions.Fraction(13, 2), 10 ** 5000, -10 ** 5000, 1e308, 5e-324]
turn = 0

def f(x):
    global turn
    turn += 1
    return odd[turn % len(odd)]
### f is a type
f = complex
### f is a class of exceptions
class f(Exception):
    def __eq__(self, o): return True
### f is a module
import math as f
### f is of another module
from operator import truth as f
### generator
def f(x):
    yield 6
### coroutine
async def f(x):
    return 7
### returns itself
def f(*a):
    return f
### weak references
import weakref

class A:
    def __eq__(self, o): return True
kept = A()

def f(x):
    return weakref.proxy(kept)
### not implemented
def f(x):
    return NotImplemented
### an ellipsis
def f(x):
    return ...
### views
def f(x):
    return [memoryview(b'6'), {6: 6}.keys(), zip([6]), map(int, ['6']), slice(6), property()][x % 6]
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
