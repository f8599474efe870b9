"""What libraries say about themselves, and no user can act on, kept from the terminal. Standard library only."""

import logging
import warnings


def quiet_libraries() -> None:
    """Silence messages that would bury what a user has to read. Only these: every other warning is shown.

    One of them is written while bitsandbytes is imported, so this comes before the imports of those libraries.
    """
    # transformers 5.23 renamed an option that TRL and PEFT still use by its old name.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    # bitsandbytes asks for a package of CPU kernels, without which it computes the same.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_advice)


def _is_no_kernel_advice(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in record.getMessage()
