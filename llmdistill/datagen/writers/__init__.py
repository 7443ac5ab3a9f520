"""Writers, one file each: ``async def write(row, ask) -> list[Trace]``, called once for every sample of a row.

A row has ``prompt`` (messages), ``prompt_id``, and where the data has them ``answer``, ``tests``, ``domain``,
``solution`` and ``more`` (its other columns). A writer is a function of the row and of what it hears: it is run once to
ask and once more, over the answers on disk, to write the file.
"""
