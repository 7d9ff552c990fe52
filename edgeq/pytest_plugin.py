"""The gate in other test suites: ``pytest --edgeq-baseline REPORT --edgeq-model FILE``.

::

    def test_the_file_has_not_regressed(edgeq_check):
        assert edgeq_check.passed, edgeq_check.failures

pytest loads this in every run where edgeq is installed: nothing of edgeq is imported before a test
asks for the fixture.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edgeq.gate import Outcome

_OPTIONS = {
    "baseline": ("REPORT", "report.json of the file that the model is held against"),
    "model": ("FILE", "GGUF file that the fixture edgeq_check judges"),
    "reference": ("MODEL", "float model of both, default: where the report says it is"),
    "max-kld-increase": ("PERCENT", "--max-kld-increase of edgeq check"),
    "max-flips": ("PERCENT", "--max-flips of edgeq check"),
    "min-tps-ratio": ("RATIO", "--min-tps-ratio of edgeq check"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("edgeq", "edgeq: has a GGUF file regressed?")
    for name, (metavar, text) in _OPTIONS.items():
        group.addoption(f"--edgeq-{name}", metavar=metavar, help=text)


@pytest.fixture(scope="session")
def edgeq_check(pytestconfig: pytest.Config) -> "Outcome":
    """Return what the gate finds: ``.passed``; ``.failures``, a line for each failed criterion.

    The test is skipped where neither file is given, and fails in one line where they do not fit.
    """
    given: dict[str, str | None] = {
        name: pytestconfig.getoption(f"--edgeq-{name}") for name in _OPTIONS
    }
    report, model = given["baseline"], given["model"]
    if report is None and model is None:
        pytest.skip("edgeq: give --edgeq-baseline REPORT and --edgeq-model FILE")
    if report is None or model is None:
        missing = "--edgeq-baseline REPORT" if report is None else "--edgeq-model FILE"
        pytest.fail(f"edgeq: give {missing} too", pytrace=False)
    from converters.errors import ConversionError
    from edgeq.criteria import Limits
    from edgeq.errors import EdgeqError
    from edgeq.gate import check

    try:
        return check(
            Path(model),
            Path(report),
            reference=given["reference"],
            limits=Limits.parse(
                given["max-kld-increase"], given["max-flips"], given["min-tps-ratio"]
            ),
        )
    except (EdgeqError, ConversionError) as error:
        pytest.fail(f"edgeq: {error}", pytrace=False)
