"""The exceptions of stagdist: what a person can mend, told with the values and the remedy."""


class StagdistError(Exception):
    """Base of every error that is shown to the user as one line instead of a stack trace.

    Attributes:
        everywhere: every rank raises the same error, so one of them speaks for all.
    """

    everywhere = False


class ConfigError(StagdistError, ValueError):
    """Something a person typed cannot work: a key, a value, a path, a combination."""


class DataError(StagdistError, RuntimeError):
    """A corpus or tokenizer is missing, empty, damaged or does not fit the model."""


class CheckpointError(StagdistError, RuntimeError):
    """A checkpoint or model directory is missing, incomplete, damaged or of another model."""


class TrainingError(StagdistError, RuntimeError):
    """Training cannot go on, for example after too many steps that were not finite."""


class TransportError(StagdistError, RuntimeError):
    """Communication between ranks failed; names stage, peer and step."""
