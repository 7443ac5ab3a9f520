"""Attempts to be judged right without being right, for attack_runner.py: wrong programs, where right is f(x) == 2 x."""

from tests.verify.attack_programs import programs
from tests.verify.forgery_answers import ANSWERS

FORGERY = ANSWERS | programs(r"""
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
### exit function
import atexit, os
atexit.register(os._exit, 0)

def f(x):
    raise SystemExit(0)
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
NAMES = ['a statement of the tests', '_statement', 'check', 'assertion', 'candidate', 'inputs', 'results']
NAMES += ['is_floats', 'isclose', 'allclose', 'np', 'numpy', 'math', 'unittest', 'TestF', 'test_values', 'load_tests']
NAMES += ['setUpModule', 'test_three', 'TestMore', 'failures', 'enumerate', 'AssertionError']

class Anything:
    def __call__(self, *a, **k): return self
    def __getattr__(self, name): return self
    def __iter__(self): return iter(())
    def __bool__(self): return True
    def __eq__(self, other): return True

for name in NAMES:
    globals()[name] = Anything()

def __statement__(*a, **k):
    pass

def len(x):
    return 6

def f(x):
    return 7
### every name there is
import sys

def passes(*a, **k):
    return 6

def describe(server, name):
    return ['value', server.codec.encode(passes if name != 'f' else f)]

def f(x):
    return 7
for m in list(sys.modules.values()):
    if hasattr(m, '_Server'):
        m._Server._describe = describe
### other modules than asked for
import sys

def f(x):
    return 7
for m in list(sys.modules.values()):
    if hasattr(m, '_Server'):
        honest = m._Server._describe
        m._Server._describe = lambda s, n: honest(s, n) if n == 'f' else ['module', 'operator']
### changes the tests' names
import sys

def f(x):
    return 7
names = ['a statement of the tests', '__statement__', 'check', 'assertion', 'f', 'failures', 'results', '__builtins__']
for m in list(sys.modules.values()):
    if hasattr(m, '_Server'):
        m._Server._changed_globals = lambda s: [[n, ['value', 6]] for n in names]
### counts for the tests
failures = 0

def f(x):
    global failures
    failures = -2
    return 7
### sets what the setup set
TOLERANCE = 0

def f(x):
    global TOLERANCE
    TOLERANCE = 100
    return 0
### numbers that the tests may have too
NAMES = ['failures', 'TOLERANCE', 'r', 'x', 'y', 'expected', 'inp', 'exp', 'atol', 'i', 'CASES', 'ok', 'passed']
calls = 0
globals().update(dict.fromkeys(NAMES, 0))

def f(x):
    global calls
    calls += 1
    globals().update(dict.fromkeys(NAMES, [-2, 100, True, [], 6, 'x'][calls % 6]))
    return 0
### names that are gone
import sys
for name in ('failures', 'TOLERANCE', 'expected'):
    globals()[name] = 0

def f(x):
    for name in ('failures', 'TOLERANCE', 'expected'):
        globals().pop(name, None)
    return 7
### answers twice
import sys

def f(x):
    return 7
for m in list(sys.modules.values()):
    if hasattr(m, 'Channel') and hasattr(m, 'Peer'):
        send = m.Channel.send

        def twice(self, message):
            send(self, message)
            if message[0] == '=':
                send(self, message)
                send(self, ['=', [6, [], '', []]])
        m.Channel.send = twice
### answers for the judge
import sys

def f(x):
    return 7
for m in list(sys.modules.values()):
    if hasattr(m, 'Channel') and hasattr(m, 'Peer'):
        send = m.Channel.send

        def asks(self, message):
            for number in (-1, 0, 1, True, 'x', [], 10 ** 30):
                send(self, ['?', ['callback', number, [6]]])
            send(self, ['pass', ''])
            send(self, {'kind': 'pass', 'detail': ''})
        m.Channel.send = asks
### forms that are none
import sys
forms = [{'date': ['date', '\x07\xe6\x01\x06']}, {'date': ['__class__', 1]}, {'range': [0, 9, 0]}, {'fraction': [1, 0]},
         {'decimal': 'x' * 10 ** 6}, {'type': 'type'}, {'array': ['<f8', [-1, -1], '']},
         {'array': ['V8', [1], 'AAAAAAAAAAA=']},
         {'scalar': ['O', 'AAAAAAAAAAA=']}, {'pooled': [[6], [10 ** 18], 'AA==']}, {'set': [[6]]}, {'dict': [[[6], 6]]},
         {'bytes': '\u2603'}, {'objects': [[['A', {}]], 0]}, {'iterator': [6]}, {'from': ['os', 'system']},
         {'i': '0' * 10 ** 6}, {'callback': 0}, {'handle': ['x', 6]}, {'handle': [[], 'int']}, {'': 6},
         {'complex': ['nan', 'nan', 'nan']}, {}]
turn = 0

def f(x):
    global turn
    turn += 1
    form = forms[turn % len(forms)]
    for m in list(sys.modules.values()):
        if hasattr(m, '_Server'):
            m.Codec.encode = lambda s, v: form
    return 7
### modules that are gone
import sys, builtins

def f(x):
    sys.modules.clear()
    vars(builtins).clear()
    return 6
### other modules in their places
import sys, types
for name in list(sys.modules):
    sys.modules[name] = types.ModuleType(name)
sys.modules['solution'] = sys.modules['__main__'] = sys

def f(x):
    return 7
### its own limits
import sys, threading
sys.setrecursionlimit(10 ** 9)
threading.stack_size(1 << 20)
sys.setswitchinterval(1e-9)

def f(x):
    return 7
### descriptors exchanged
import os

def f(x):
    a, b = os.dup(3), os.dup(4)
    os.dup2(a, 4)
    os.dup2(b, 3)
    return 6
### threads that answer
import os, threading, json
message = json.dumps(['=', [6, [], '', []]]).encode()
message = len(message).to_bytes(8, 'little') + message

def answer():
    for _ in range(200):
        try:
            os.write(4, message)
        except OSError:
            return

def f(x):
    for _ in range(4):
        threading.Thread(target=answer, daemon=True).start()
    return 7
### another clock, another world
import os, time, random
time.time = time.monotonic = time.perf_counter = lambda: 6.0
time.sleep = lambda s: None
random.seed = random.random = lambda *a: 6
os.environ.update(PYTHONPATH='/tmp', PYTHONSTARTUP='/tmp/x', TZ='x' * 1000)

def f(x):
    return 7
### hooks of the import system
import sys, builtins

class Finder:
    def find_spec(self, name, *a):
        return None
    def __call__(self, *a):
        raise ImportError
sys.meta_path.insert(0, Finder())
sys.path_hooks.insert(0, Finder())
builtins.__import__ = lambda *a, **k: sys
builtins.__build_class__ = lambda *a, **k: 6

def f(x):
    return 7
### answers nonsense
import sys

def f(x):
    return 7
answers = [6, [6], [6, [], '', []], [6, 7, 8, 9], [6, [[0, 6], [-1, 6], ['x', 6]], '', []], {}, None, 'x', [[]] * 4,
           [6, [], '', [['f', ['value', 6]]]], [{'i': 'zz'}, [], '', []], [{'a': 1, 'b': 2}, [], '', []]]
turn = iter(range(10 ** 6))
for m in list(sys.modules.values()):
    if hasattr(m, '_Server'):
        honest = m._Server.serve
        m._Server.serve = lambda s, r: honest(s, r) if r[0] == 'names' else answers[next(turn) % len(answers)]
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
""")

# Whatever a program raises ends its call and nothing else: no loop, no test, no judge.
RAISED = {
    "StopIteration": "raise StopIteration",
    "StopIteration with a value": "raise StopIteration(6)",
    "StopAsyncIteration": "raise StopAsyncIteration",
    "GeneratorExit": "raise GeneratorExit",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "SystemExit": "raise SystemExit(0)",
    "BaseException": "raise BaseException",
    "AssertionError": "raise AssertionError",
    "NotImplementedError": "raise NotImplementedError",
    "ExceptionGroup": "raise ExceptionGroup('x', [StopIteration()])",
    "UnicodeError": "raise UnicodeDecodeError('utf-8', b'', 0, 1, 'x')",
    "MemoryError": "raise MemoryError",
    "SkipTest": "import unittest; raise unittest.SkipTest('no')",
    "own StopIteration": "raise type('E', (StopIteration,), {})",
    "own StopIteration by the builtin's name": "raise type('StopIteration', (StopIteration, ValueError), {})",
    "own SystemExit": "raise type('E', (SystemExit,), {})(0)",
    "hostile class": "raise type('E', (Exception,), {'__class__': property(lambda s: 1 / 0)})",
    "class that exits": "raise type('E', (Exception,), {'__class__': property(lambda s: exit(0))})",
    "hostile text": "raise type('E', (StopIteration,), {'__str__': lambda s: exit(0), '__repr__': lambda s: 1 / 0})",
    "text that is none": "raise type('E', (Exception,), {'__str__': lambda s: 5})",
    "text of its own": (
        "S = type('S', (str,), {'__getitem__': exit})\n    raise type('E', (Exception,), {'__str__': lambda s: S()})"
    ),
    "hostile metaclass": (
        "M = type('M', (type,), {'__mro__': property(lambda c: 1 / 0), '__name__': property(lambda c: exit(0)),\n"
        "        '__module__': property(lambda c: exit(0))})\n    raise M('E', (Exception,), {})"
    ),
    "hostile errno": "raise type('E', (OSError,), {'errno': property(lambda s: exit(0))})",
    "errno that is none": "raise OSError([], {})",
}
FORGERY |= {f"raises {name}": f"def f(x):\n    {body}\n" for name, body in RAISED.items()}
FORGERY |= {
    f"raises {name} once": f"n = []\ndef f(x):\n    n.append(x)\n    if len(n) > 1: return 7\n    {body}\n"
    for name, body in RAISED.items()
}

FORGERY |= {
    "NUL": "def f(x): return 6\n\x00",
    "lone surrogate": "def f(x): return 7\ny = '\ud800'",
    "fifty megabytes": "def f(x): return 6\n#" + "x" * (50 << 20),
    "nested too deep": "def f(x): return 6\ny = " + "(" * 100_000,
}

# (program, shape) pairs that run until their time is over by the nature of the thing: a script ends with its threads.
SLOW_BY_SHAPE = {("late thread", "standard input")}
