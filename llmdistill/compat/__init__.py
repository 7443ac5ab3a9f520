"""The only place that touches unstable API of others, a file per neighbour: what breaks when its next release comes is
looked through together then.

Importing these modules imports none of what they speak of. Every use has a contract test in ``tests/test_compat.py``
that fails loudly when an upgrade changes what is relied on here.
"""
