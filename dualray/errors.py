"""Errors a person can act on: one sentence with field, values, rule and remedy.

The command line prints `str(error)` and exits with `exit_code`; nothing else of an
error reaches the terminal. Programming errors stay ordinary exceptions.
"""


class DualrayError(Exception):
    """Base of everything a user can cause. The message is the sentence, `hint` the remedy."""

    exit_code = 2

    def __init__(self, sentence: str, *, hint: str) -> None:
        super().__init__(sentence, hint)
        self.sentence = sentence
        self.hint = hint

    def __str__(self) -> str:
        end = "" if self.hint.endswith("?") else "."
        return f"{self.sentence}; {self.hint}{end}"

    def __reduce__(self):
        # Errors cross process borders (Ray actors, spawned tests) by pickling, keyword included.
        return (_rebuild, (type(self), self.sentence, self.hint))


def _rebuild(cls: type[DualrayError], sentence: str, hint: str) -> DualrayError:
    return cls(sentence, hint=hint)


class ConfigError(DualrayError):
    """A field of a run file, preset or command line breaks a rule."""


class DataError(DualrayError):
    """A source, shard or tokenizer cannot be used."""


class CheckpointError(DualrayError):
    """A checkpoint is missing, damaged or belongs to another model."""


class ResourceError(DualrayError):
    """The cluster lacks what the layout needs, or a port is taken."""


class RunError(DualrayError):
    """A run cannot be reached, or has failed."""


class RequestError(DualrayError):
    """A served request breaks a rule; `field` names the parameter."""

    def __init__(self, sentence: str, *, hint: str, field: str = "") -> None:
        super().__init__(sentence, hint=hint)
        self.field = field
