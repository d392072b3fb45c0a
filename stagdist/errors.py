"""The exceptions of stagdist: errors that the user can fix, with the values and the remedy."""


class StagdistError(Exception):
    """Base of every error that is shown to the user as one line instead of a stack trace.

    Attributes:
        everywhere: every rank raises the same error, so only one of them reports it.
    """

    everywhere = False


class ConfigError(StagdistError, ValueError):
    """User input is invalid: a key, a value, a path, a combination."""


class DataError(StagdistError, RuntimeError):
    """A corpus or tokenizer is missing, empty, damaged or does not fit the model."""


class CheckpointError(StagdistError, RuntimeError):
    """A checkpoint or model directory is missing, incomplete, damaged or of another model."""


class OtherReleaseError(CheckpointError):
    """A checkpoint is not damaged, but of a version of the format that this release does not read."""


class SavingError(CheckpointError):
    """A checkpoint or model directory of a run could not be written; starting again may help."""


class TrainingError(StagdistError, RuntimeError):
    """Training cannot continue, for example after too many steps that were not finite."""


class TransportError(StagdistError, RuntimeError):
    """Communication between ranks failed; the message has stage, peer and step."""


class QueueFullError(StagdistError, RuntimeError):
    """A request was not accepted because too many are waiting; it can be submitted again later."""
