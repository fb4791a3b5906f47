# SPDX-License-Identifier: Apache-2.0
"""How good a policy is, whether it is better than another, and a page that shows it."""

from llm_xrisk.evaluation.bootstrap import Bootstrap as Bootstrap
from llm_xrisk.evaluation.bootstrap import Interval as Interval
from llm_xrisk.evaluation.compare import Comparison as Comparison
from llm_xrisk.evaluation.compare import compare as compare
from llm_xrisk.evaluation.compare import compare_files as compare_files
from llm_xrisk.evaluation.compare import comparison_table as comparison_table
from llm_xrisk.evaluation.curves import Panel as Panel
from llm_xrisk.evaluation.curves import RunCurve as RunCurve
from llm_xrisk.evaluation.curves import curves_from_log_history as curves_from_log_history
from llm_xrisk.evaluation.curves import standard_panels as standard_panels
from llm_xrisk.evaluation.partial_auc import one_way_partial_auc as one_way_partial_auc
from llm_xrisk.evaluation.partial_auc import two_way_partial_auc as two_way_partial_auc
from llm_xrisk.evaluation.pass_at_k import CompletionSample as CompletionSample
from llm_xrisk.evaluation.pass_at_k import Evaluation as Evaluation
from llm_xrisk.evaluation.pass_at_k import evaluate as evaluate
from llm_xrisk.evaluation.ranking_metrics import ranking_metrics as ranking_metrics
from llm_xrisk.evaluation.report import Report as Report
from llm_xrisk.evaluation.report import write_report as write_report
from llm_xrisk.evaluation.results import results_table as results_table
from llm_xrisk.evaluation.results import tabulate as tabulate
