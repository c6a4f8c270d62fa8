"""hivi: hierarchical variational inference on JAX."""

from hivi._bounds import Elbo, ImportanceWeighted
from hivi._comparison import Comparison
from hivi._curvature import Curvature, curvature
from hivi._errors import CorpusError, FamilyError, FitError, HiviError, LoadError, TargetError
from hivi._estimators.auto import Auto
from hivi._estimators.control_variates import DoubleControlVariates
from hivi._estimators.differences import Difference, LocalExpectation
from hivi._estimators.disarm import DisARM
from hivi._estimators.enumeration import Enumeration
from hivi._estimators.expectation import Expectation
from hivi._estimators.factor_expectation import FactorExpectation
from hivi._estimators.hierarchical_score import HierarchicalScore
from hivi._estimators.learned import Learned
from hivi._estimators.leave_one_out import LeaveOneOut
from hivi._estimators.moving_average import MovingAverage
from hivi._estimators.pathwise import Pathwise
from hivi._estimators.score import Score
from hivi._estimators.sticking import StickTheLanding
from hivi._families.amortised import Amortised
from hivi._families.auxiliary import Component, InverseFlow, Linearised, SemiImplicit
from hivi._families.codes import Codes
from hivi._families.copula import Copula
from hivi._families.delta import Delta
from hivi._families.flow import Flow
from hivi._families.full_rank import FullRank
from hivi._families.gamma import MeanFieldGamma
from hivi._families.hierarchical import Hierarchical
from hivi._families.low_rank import LowRank
from hivi._families.mean_field import MeanField
from hivi._families.mixture import Mixture
from hivi._families.recursive import Recursive
from hivi._families.standardised import Standardised
from hivi._families.structured import Structured
from hivi._fit.loop import fit
from hivi._fit.pointwise import Estimate, Pointwise
from hivi._fit.result import Fit, load
from hivi._space import Latent
from hivi._target.base import Target, explain
from hivi._target.log_joint import from_log_joint
from hivi._trust import Trust, trust
from hivi.compare import compare
from hivi.interop.arviz import to_arviz
from hivi.interop.numpyro import from_numpyro
from hivi.interop.pymc import from_pymc
from hivi.topics.estimator import DeepExponentialFamily

__version__ = "0.1.0"

__all__ = [
    "Amortised",
    "Auto",
    "Codes",
    "Comparison",
    "Component",
    "Copula",
    "CorpusError",
    "Curvature",
    "DeepExponentialFamily",
    "Delta",
    "Difference",
    "DisARM",
    "DoubleControlVariates",
    "Elbo",
    "Enumeration",
    "Estimate",
    "Expectation",
    "FactorExpectation",
    "FamilyError",
    "Fit",
    "FitError",
    "Flow",
    "FullRank",
    "Hierarchical",
    "HierarchicalScore",
    "HiviError",
    "ImportanceWeighted",
    "InverseFlow",
    "Latent",
    "Learned",
    "LeaveOneOut",
    "Linearised",
    "LoadError",
    "LocalExpectation",
    "LowRank",
    "MeanField",
    "MeanFieldGamma",
    "Mixture",
    "MovingAverage",
    "Pathwise",
    "Pointwise",
    "Recursive",
    "Score",
    "SemiImplicit",
    "Standardised",
    "StickTheLanding",
    "Structured",
    "Target",
    "TargetError",
    "Trust",
    "compare",
    "curvature",
    "explain",
    "fit",
    "from_log_joint",
    "from_numpyro",
    "from_pymc",
    "load",
    "to_arviz",
    "trust",
]
