"""The record: one folder per run that is never changed once the run has ended, and an index rebuilt from the folders.

While it runs, a run owns ``<runs_dir>/.<id>.part/`` by a lock on the file ``.lock`` in it, which the kernel takes back
when the process ends, however it ends. When the run ends its record is completed, then the folder is renamed to
``<runs_dir>/<id>/``, and only then is anything deleted; so a folder with a plain name is always complete, and a kill
between two steps leaves a folder that :func:`recover` finishes. A folder holds

- ``record.json``: what was run, on what, and its figures (:data:`TEMPLATE` lists the keys; unknown is ``null``);
- ``metrics.csv``: ``epoch,step,name,value``, one line per figure logged on the way;
- whatever else the run writes beside them (a checkpoint, the model); files whose names start with a dot are only for
  the time of the run.

Only the standard library is used here, so records can be read where nothing is installed.
"""

from __future__ import annotations

from locallearn.records._files import plain_file, write_file
from locallearn.records._folder import RunFolder
from locallearn.records._index import read_index, rebuild_index
from locallearn.records._keys import ANALYSIS, CHECKPOINT, COST_COLUMNS, SCHEMA, SHARES, TEMPLATE, Metric, Quality
from locallearn.records._place import hardware, source, versions
from locallearn.records._reading import Record, Scan, find_records, load_record, scan
from locallearn.records._recovery import recover

__all__ = [
    "ANALYSIS",
    "CHECKPOINT",
    "COST_COLUMNS",
    "SCHEMA",
    "SHARES",
    "TEMPLATE",
    "Metric",
    "Quality",
    "Record",
    "RunFolder",
    "Scan",
    "find_records",
    "hardware",
    "load_record",
    "plain_file",
    "read_index",
    "rebuild_index",
    "recover",
    "scan",
    "source",
    "versions",
    "write_file",
]
