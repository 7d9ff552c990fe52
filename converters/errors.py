"""The one exception that file reading and writing raises for what a user can mend.

Message: where: what is wrong; got X, expected Y. What to do.
"""


class ConversionError(Exception):
    """A checkpoint, tokenizer or GGUF file that cannot be read, or an output that cannot be written."""
