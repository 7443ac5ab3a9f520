def preflight(*a, **k):
    return []
