"""What `evaluate.py --report` does without a measure: every page of the study."""

from collections.abc import Callable

from core.common.errors import raise_problems
from core.common.printing import say
from core.evaluation.options import EvaluateConfig
from core.evaluation.run import measured_rows, option_problems
from core.study.block_models import SECTIONS as BLOCK_SECTIONS
from core.study.pages import write_report
from core.study.remasking import SECTIONS as REMASKING_SECTIONS
from core.study.results import SECTIONS as RESULT_SECTIONS


def write_study(config: EvaluateConfig, say: Callable[[str], None] = say) -> None:
    """Write the page `config.report` again, from the checkpoints that exist and the saved records of the others."""
    raise_problems(option_problems(config, {}))
    write_report(config, (*RESULT_SECTIONS, *REMASKING_SECTIONS, *BLOCK_SECTIONS),
                 lambda changed, given: measured_rows(changed, given, say), say)
