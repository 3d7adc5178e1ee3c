"""The one configuration tree: typed, frozen, read from YAML, each field documented where it is declared.

`load_config` reads a file, applies `--set section.key=value` overrides and validates the result. A mistake raises
`ConfigError` that names the key, the value found, the values allowed and, for an unknown key, the nearest known one.
Relative paths are taken from the working directory of the command, as spark-submit takes its own.
"""

from __future__ import annotations

from ncf_dist.config.evaluate import Evaluate
from ncf_dist.config.fetch import Dataset, Fetch
from ncf_dist.config.gates import UNDONE, Gates
from ncf_dist.config.input import Columns, IdType, Input, InputFormat, Place, SideColumn, SideTable
from ncf_dist.config.layout import Layout
from ncf_dist.config.load import changed, load_config, parse_ds
from ncf_dist.config.loader import Loader
from ncf_dist.config.log import Log
from ncf_dist.config.model import Model, embedding_size
from ncf_dist.config.negatives import Negatives
from ncf_dist.config.parts import Counts, Ease, Parts
from ncf_dist.config.paths import Paths
from ncf_dist.config.publish import RESERVED, Gate, Publish
from ncf_dist.config.retention import Retention
from ncf_dist.config.score import IdList, Score
from ncf_dist.config.section import NonNegativeInt, PositiveInt, Section
from ncf_dist.config.sequences import Sequences
from ncf_dist.config.sinks import Sinks, Tracking
from ncf_dist.config.spark import MEMORY_PATTERN, Spark
from ncf_dist.config.split import Split
from ncf_dist.config.status import Status
from ncf_dist.config.sweep import Range, Sweep
from ncf_dist.config.train import Pretrained, Train
from ncf_dist.config.tree import Config

__all__ = [
    "MEMORY_PATTERN",
    "RESERVED",
    "UNDONE",
    "Columns",
    "Config",
    "Counts",
    "Dataset",
    "Ease",
    "Evaluate",
    "Fetch",
    "Gate",
    "Gates",
    "IdList",
    "IdType",
    "Input",
    "InputFormat",
    "Layout",
    "Loader",
    "Log",
    "Model",
    "Negatives",
    "NonNegativeInt",
    "Parts",
    "Paths",
    "Place",
    "PositiveInt",
    "Pretrained",
    "Publish",
    "Range",
    "Retention",
    "Score",
    "Section",
    "Sequences",
    "SideColumn",
    "SideTable",
    "Sinks",
    "Spark",
    "Split",
    "Status",
    "Sweep",
    "Tracking",
    "Train",
    "changed",
    "embedding_size",
    "load_config",
    "parse_ds",
]
