"""The errors dpfast raises on purpose (a kernel adds its own). Each says what was expected, what came, and the cure."""


class DPFastError(Exception):
    """Root of all dpfast errors."""


class CaptureError(DPFastError):
    """The model or its losses cannot be clipped per example; nothing was written to any ``p.grad``."""


class PrivacyError(DPFastError):
    """Going on would break the stated guarantee."""


class BudgetExhausted(PrivacyError):
    """Every planned step has been charged."""


class LedgerError(PrivacyError):
    """The ledger is damaged, belongs to another plan, or is in use by another process."""


class ConfigError(DPFastError):
    """A recipe, plan or option has a value that cannot be used."""


class DataError(DPFastError):
    """A data set has the wrong shape, dtype or contents."""


class FileError(DPFastError):
    """A file cannot be written (what was there is intact), or holds something that cannot be used."""


class CheckpointError(FileError):
    """A checkpoint cannot be written, or is corrupt or foreign; the previous one is intact."""


class RunLocked(DPFastError):
    """Another process works in the same run directory."""
