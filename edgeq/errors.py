"""Every exception that a user can mend.

    EdgeqError
    ├── RecipeError        flags, plan.json or a target that cannot be met
    ├── RegistryError      unknown or duplicate name of a quantizer, allocator, ...
    ├── RuntimeLibraryError  llama-cpp-python is missing, has another layout, or refused a file
    ├── CalibrationError   text, imatrix or statistics that do not fit the model
    └── EvaluationError    reference logits or files that cannot be compared

Files raise ``converters.ConversionError``. ``cli.main`` turns both roots into one line and exit
code 1. Message: where: what is wrong; got X, expected Y. What to do.
"""


class EdgeqError(Exception):
    """Root of the errors that a user can mend."""


class RecipeError(EdgeqError):
    """Flags, plan or target that contradict each other or cannot be met."""


class RegistryError(EdgeqError):
    """Unknown or duplicate name in a registry."""


class RuntimeLibraryError(EdgeqError):
    """llama-cpp-python is missing, was built with another layout, or refused a file."""


class CalibrationError(EdgeqError):
    """Text, importance matrix or statistics that do not fit the model."""


class EvaluationError(EdgeqError):
    """Reference logits or files that cannot be compared."""
